// Forwards that a CUDA stream starts and waits for.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bind_layer.h"
#include "bindings/release.h"
#include "serve/stream_forward.h"

namespace ktmoe {
namespace {

// Keeps the Python objects alive that the forward works on.
struct Owner : Releasable {
  Owner(std::shared_ptr<MoeLayer> l, std::shared_ptr<LoraAdapter> a) : layer(std::move(l)), lora(std::move(a)) {}
  const std::shared_ptr<MoeLayer> layer;
  const std::shared_ptr<LoraAdapter> lora;
  std::vector<OutArray> arrays;
  std::optional<StreamForward> forward;  // last: it goes first
};

class PyStreamForward {
 public:
  explicit PyStreamForward(std::shared_ptr<StreamForward> forward) : shared(std::move(forward)) {}
  void launch(StreamForward::Step step, CudaStream stream) const {
    const ReleaseAtExit release;
    const WithoutGil nogil;  // a full stream makes the driver wait for a host function
    StreamForward::launch(shared, step, stream);
  }
  const std::shared_ptr<StreamForward> shared;
};

StreamForward::Life life_from_name(const std::string& name) {
  using Life = StreamForward::Life;
  if (name == "once") return Life::once;
  if (name == "kept") return Life::kept;
  require(name == "captured", ErrorKind::value, "[StreamForward] life: got ", name, ", expected once, kept or captured");
  return Life::captured;
}

// arrays: n_tokens, hidden, ids, weights, out
PyStreamForward make_forward(std::shared_ptr<TaskQueue> queue, std::shared_ptr<StreamErrors> errors, const std::string& name,
                             std::shared_ptr<MoeLayer> layer, const std::vector<OutArray>& arrays, std::shared_ptr<LoraAdapter> lora,
                             int protected_k, const std::optional<OutArray>& later, const PyStreamForward* earlier,
                             const std::string& life) {
  const ReleaseAtExit release;
  constexpr const char* kName = "StreamForward";
  require(arrays.size() == 5, ErrorKind::value, "[StreamForward] arrays: got ", arrays.size(), ", expected 5");
  const OutArray& out = arrays[4];
  const InArray hidden(arrays[1]), ids(arrays[2]), weights(arrays[3]);
  const ForwardArgs args = forward_args(kName, *layer, hidden, ids, weights);
  TensorArg<InArray>(kName, "hidden", hidden).contiguous();
  const auto* n_tokens = TensorArg<OutArray>(kName, "n_tokens", arrays[0]).dtype({Dtype::int32}).shape({1}).data<std::int32_t>();
  const StreamForward::Memory memory{n_tokens,
                                     args.routing.n_tokens,
                                     args.hidden.data,
                                     args.routing,
                                     forward_out(kName, *layer, args, out),
                                     later ? forward_out(kName, *layer, args, *later) : nullptr};
  auto owner = std::make_unique<Owner>(std::move(layer), std::move(lora));
  owner->arrays = arrays;
  if (later) owner->arrays.push_back(*later);
  owner->forward.emplace(std::move(queue), std::move(errors), name, *owner->layer, owner->lora.get(), memory, protected_k,
                         earlier ? earlier->shared : nullptr, life_from_name(life));
  const std::shared_ptr<Owner> shared = share_releasable(std::move(owner));
  return PyStreamForward(std::shared_ptr<StreamForward>(shared, &*shared->forward));
}

}  // namespace

void init_stream(nb::module_& m) {
  using Step = StreamForward::Step;
  nb::class_<StreamErrors>(m, "StreamErrors")
      .def(nb::new_([] { return std::make_shared<StreamErrors>(); }))
      .def("check", [](StreamErrors& e) {
        if (const auto error = e.take()) std::rethrow_exception(error);
      });
  nb::class_<PyStreamForward>(m, "StreamForward")
      .def(nb::new_(&make_forward), nb::arg("queue"), nb::arg("errors"), nb::arg("name"), nb::arg("layer"), nb::arg("arrays"),
           nb::arg("lora").none() = nb::none(), nb::arg("protected_k") = 0, nb::arg("later").none() = nb::none(),
           nb::arg("earlier").none() = nb::none(), nb::arg("life") = "once")
      .def("start", [](const PyStreamForward& f, CudaStream stream) { f.launch(Step::start, stream); })
      .def("wait", [](const PyStreamForward& f, CudaStream stream) { f.launch(Step::wait, stream); })
      .def("wait_later", [](const PyStreamForward& f, CudaStream stream) { f.launch(Step::wait_later, stream); })
      .def("settle", [](const PyStreamForward& f, CudaStream stream) { f.launch(Step::settle, stream); });
}

}  // namespace ktmoe
