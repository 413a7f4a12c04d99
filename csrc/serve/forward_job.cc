#include "serve/forward_job.h"

#include <algorithm>

namespace ktmoe {
namespace {

Routing with_ids(Routing routing, const std::vector<std::int32_t>& ids) {
  routing.ids32 = ids.data();
  routing.ids64 = nullptr;
  return routing;
}

}  // namespace

void ForwardJob::run_now(int n_tokens) {
  later_ = nothing;
  error_ = nullptr;
  routing_.n_tokens = n_tokens;
  try {
    if (defers()) {
      routing_.check(layer_.config());
      split_.assign(layer_.config(), routing_, deferral_.protected_k);
      layer_.forward(hidden_, with_ids(routing_, split_.now), out_, lora_);
    } else {
      layer_.forward(hidden_, routing_, out_, lora_);
    }
    if (deferral_.earlier) add_earlier();
  } catch (...) {
    later_ = failed;
    error_ = std::current_exception();
    throw;
  }
}

void ForwardJob::run_later() {
  if (later_ == failed) std::rethrow_exception(error_);
  try {
    layer_.forward(hidden_, with_ids(routing_, split_.later), deferral_.later, lora_);
    later_ = done;
  } catch (...) {
    later_ = failed;
    error_ = std::current_exception();
    throw;
  }
}

// Each part is rounded to bf16, as every output of a layer is; their sum is exact in fp32 (but for its last bits) and rounded once.
void ForwardJob::add_earlier() const {
  const ForwardJob& earlier = *deferral_.earlier;
  if (earlier.later_ == failed) std::rethrow_exception(earlier.error_);
  require(earlier.later_ == done, ErrorKind::runtime, "[forward] deferred experts of the layer before: they did not run");
  const int n = routing_.n_tokens, hidden = layer_.config().hidden;
  require(earlier.routing_.n_tokens == n, ErrorKind::runtime, "[forward] deferred experts of the layer before: got ",
          earlier.routing_.n_tokens, " tokens, expected ", n);
  constexpr int kUnit = 16;
  SubPools& pools = layer_.pools();
  SubPools::Session session(pools, pools.count(), n < 2 * kUnit ? Wake::nobody : Wake::all);
  session.parallel_for(ceil_div(n, kUnit), [&](int unit, Scratch&) {
    const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(unit) * kUnit * hidden;
    const std::ptrdiff_t last = static_cast<std::ptrdiff_t>(std::min((unit + 1) * kUnit, n)) * hidden;
    for (std::ptrdiff_t i = first; i < last; ++i) out_[i] = to_bf16(to_float(out_[i]) + to_float(earlier.deferral_.later[i]));
  });
}

}  // namespace ktmoe
