#include "bindings/bind_job.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>

namespace ktmoe {
namespace {

std::vector<bf16> dense_rows(Tokens x, int n, int hidden) {
  std::vector<bf16> rows;
  rows.reserve(static_cast<std::size_t>(n) * static_cast<std::size_t>(hidden));
  for (int t = 0; t < n; ++t) rows.insert(rows.end(), x.data + t * x.ld, x.data + t * x.ld + hidden);
  return rows;
}

template <class T>
std::vector<T> copy_of(const T* data, std::size_t n) {
  return data ? std::vector<T>(data, data + n) : std::vector<T>();
}

OwningJob make_owning(std::shared_ptr<MoeLayer> layer, const InArray& hidden, const InArray& ids, const InArray& weights,
                      const OutArray& out, std::shared_ptr<LoraAdapter> lora, int protected_k, std::optional<OutArray> later,
                      const OwningJob* earlier) {
  JobDeferral deferral{protected_k, std::move(later), earlier ? earlier->shared : nullptr};
  return {make_job("ForwardJob", std::move(layer), hidden, ids, weights, out, std::move(lora), std::move(deferral))};
}

}  // namespace

QueuedForward::QueuedForward(const char* function, std::shared_ptr<MoeLayer> layer, const ForwardArgs& args, bf16* dst, const OutArray& out,
                             std::shared_ptr<LoraAdapter> lora, JobDeferral deferral)
    : layer_(std::move(layer)),
      lora_(std::move(lora)),
      out_(out),
      deferral_(std::move(deferral)),
      n_tokens_(args.routing.n_tokens),
      hidden_(dense_rows(args.hidden, n_tokens_, layer_->config().hidden)),
      weights16_(copy_of(args.routing.weights16, slots())),
      ids32_(copy_of(args.routing.ids32, slots())),
      ids64_(copy_of(args.routing.ids64, slots())),
      weights32_(copy_of(args.routing.weights32, slots())),
      job_(*layer_, lora_.get(), {hidden_.data(), layer_->config().hidden}, routing(), dst,
           {deferral_.protected_k, later_memory(function, args), earlier_job()}) {}

bf16* QueuedForward::later_memory(const char* function, const ForwardArgs& args) const {
  return deferral_.later ? forward_out(function, *layer_, args, *deferral_.later) : nullptr;
}

Routing QueuedForward::routing() const {
  auto or_null = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
  return {n_tokens_, or_null(ids32_), or_null(ids64_), or_null(weights32_), or_null(weights16_)};
}

void QueuedForward::run_now() {
  job_.run_now(n_tokens_);
  job_.forget_earlier();
  deferral_.earlier.reset();  // or every layer of a pass would keep those before it
}

std::shared_ptr<QueuedForward> make_job(const char* function, std::shared_ptr<MoeLayer> layer, const InArray& hidden, const InArray& ids,
                                        const InArray& weights, const OutArray& out, std::shared_ptr<LoraAdapter> lora,
                                        JobDeferral deferral) {
  const ReleaseAtExit release;
  const ForwardArgs args = forward_args(function, *layer, hidden, ids, weights);
  bf16* dst = forward_out(function, *layer, args, out);
  return share_releasable(
      std::make_unique<QueuedForward>(function, std::move(layer), args, dst, out, std::move(lora), std::move(deferral)));
}

void init_job(nb::module_& m) {
  nb::class_<OwningJob>(m, "ForwardJob")
      .def(nb::new_(&make_owning), nb::arg("layer"), nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"),
           nb::arg("lora").none() = nb::none(), nb::arg("protected_k") = 0, nb::arg("later").none() = nb::none(),
           nb::arg("earlier").none() = nb::none());
}

}  // namespace ktmoe
