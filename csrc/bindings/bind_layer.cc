// MoeLayer, LoraAdapter and ForwardCache.
#include "bindings/bind_layer.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/raw_parts.h"
#include "moe/packing.h"

namespace ktmoe {

ForwardArgs forward_args(const char* function, const MoeLayer& layer, const InArray& hidden, const InArray& ids, const InArray& weights) {
  const MoeConfig& c = layer.config();
  TensorArg<InArray> x(function, "hidden", hidden), i(function, "ids", ids), w(function, "weights", weights);
  x.dtype({Dtype::bf16}).shape({-1, c.hidden}).rows_contiguous();
  i.dtype({Dtype::int32, Dtype::int64}).shape({x.extent(0), c.top_k}).contiguous();
  w.dtype({Dtype::fp32, Dtype::bf16}).shape({x.extent(0), c.top_k}).contiguous();
  require(x.extent(0) * c.top_k < (std::int64_t{1} << 31), ErrorKind::value, x.where(), ": got ", x.extent(0),
          " tokens, expected fewer than 2^31 / top_k");
  ForwardArgs args{{x.data<bf16>(), x.stride(0)}, {static_cast<int>(x.extent(0)), nullptr, nullptr, nullptr, nullptr}};
  if (i.is(Dtype::int32)) args.routing.ids32 = i.data<std::int32_t>();
  if (i.is(Dtype::int64)) args.routing.ids64 = i.data<std::int64_t>();
  if (w.is(Dtype::fp32)) args.routing.weights32 = w.data<float>();
  if (w.is(Dtype::bf16)) args.routing.weights16 = w.data<bf16>();
  return args;
}

bf16* forward_out(const char* function, const MoeLayer& layer, const ForwardArgs& args, const OutArray& out) {
  const int hidden = layer.config().hidden, n = args.routing.n_tokens;
  TensorArg<OutArray> o(function, "out", out);
  o.dtype({Dtype::bf16}).shape({n, hidden}).contiguous();
  bf16* dst = o.data<bf16>();
  if (n > 0) {
    const bf16 *first = args.hidden.data, *last = first + (n - 1) * args.hidden.ld + hidden;
    require(dst + static_cast<std::ptrdiff_t>(n) * hidden <= first || dst >= last, ErrorKind::value, o.where(),
            ": got memory that overlaps hidden, expected its own");
  }
  return dst;
}

namespace {

std::shared_ptr<MoeLayer> make_layer(std::shared_ptr<SubPools> pool, int n_experts, int top_k, int hidden, int inter,
                                     const std::string& format, const std::string& isa, int chunk_tokens, std::optional<InArray> on_gpu,
                                     const std::string& activation, float swiglu_limit, float swiglu_alpha, const std::string& down_format,
                                     bool check_finite) {
  const WeightFormat gate_up = format_from_name(format), down = down_format.empty() ? gate_up : format_from_name(down_format);
  MoeConfig config{n_experts,
                   top_k,
                   hidden,
                   inter,
                   gate_up,
                   down,
                   isa_from_name(isa),
                   chunk_tokens,
                   {},
                   Activation::from_name(activation, swiglu_limit, swiglu_alpha),
                   check_finite};
  config.validate();
  if (on_gpu) {
    TensorArg<InArray> mask("MoeLayer", "on_gpu", *on_gpu);
    mask.dtype({Dtype::boolean, Dtype::uint8}).shape({n_experts}).contiguous();
    config.on_gpu.assign(mask.data<std::uint8_t>(), mask.data<std::uint8_t>() + n_experts);
  }
  return std::make_shared<MoeLayer>(std::move(pool), std::move(config));
}

// Gate matrices are given exactly where the activation has a gate.
template <class Array>
void check_gate(const char* function, const std::optional<Array>& gate, bool gated) {
  require(gate.has_value() == gated, ErrorKind::type, "[", function, "] gate: got ", gate ? "an array" : "None", ", expected ",
          gated ? "an array" : "None: the activation has no gate");
}

// The data of a dense matrix or vector, null if there is none.
template <class T, class Array>
auto* data_of(const char* function, const char* name, const std::optional<Array>& array, Dtype dtype,
              std::initializer_list<std::int64_t> shape) {
  if (!array) return decltype(TensorArg<Array>(function, name, *array).template data<T>()){nullptr};
  return TensorArg<Array>(function, name, *array).dtype({dtype}).shape(shape).contiguous().template data<T>();
}

using MaybeIn = std::optional<InArray>;

RawBlock raw_matrix(const char* name, const std::vector<InArray>& arrays, WeightFormat format, int n, int k) {
  const FormatInfo& info = format_info(format);
  if (info.published()) {
    const auto parts = raw_parts<const std::byte>("load_expert_raw", name, arrays, info, n, k);
    return {{parts[0], parts[1], parts[2]}};
  }
  require(arrays.size() == 1, ErrorKind::value, "[load_expert_raw] ", name, ": got ", arrays.size(), " arrays, expected 1 for format ",
          info.name);
  return raw_bf16(TensorArg<InArray>("load_expert_raw", name, arrays[0]).dtype({Dtype::bf16}).shape({n, k}).contiguous().data<bf16>());
}

Biases biases_of(const char* function, const MoeConfig& c, const MaybeIn& gate, const MaybeIn& up, const MaybeIn& down) {
  return {data_of<float>(function, "gate_bias", gate, Dtype::fp32, {c.inter}),
          data_of<float>(function, "up_bias", up, Dtype::fp32, {c.inter}),
          data_of<float>(function, "down_bias", down, Dtype::fp32, {c.hidden})};
}

void load_expert_raw(MoeLayer& layer, int expert, const std::optional<std::vector<InArray>>& gate, const std::vector<InArray>& up,
                     const std::vector<InArray>& down, const MaybeIn& gate_bias, const MaybeIn& up_bias, const MaybeIn& down_bias) {
  const MoeConfig& c = layer.config();
  check_gate("load_expert_raw", gate, c.activation.gated());
  const RawBlock g = gate ? raw_matrix("gate", *gate, c.format, c.inter, c.hidden) : RawBlock{};
  const RawBlock u = raw_matrix("up", up, c.format, c.inter, c.hidden), d = raw_matrix("down", down, c.down_format, c.hidden, c.inter);
  const Biases biases = biases_of("load_expert_raw", c, gate_bias, up_bias, down_bias);
  const WithoutGil nogil;
  layer.load_expert_raw(expert, g, u, d, biases);
}

void load_expert(MoeLayer& layer, int expert, const MaybeIn& gate, const MaybeIn& up, const MaybeIn& down, const MaybeIn& gate_bias,
                 const MaybeIn& up_bias, const MaybeIn& down_bias) {
  constexpr const char* kName = "load_expert";
  const int hidden = layer.config().hidden, inter = layer.config().inter;
  check_gate(kName, gate, layer.config().activation.gated());
  const bf16* g = data_of<bf16>(kName, "gate", gate, Dtype::bf16, {inter, hidden});
  const bf16* u = data_of<bf16>(kName, "up", up, Dtype::bf16, {inter, hidden});
  const bf16* d = data_of<bf16>(kName, "down", down, Dtype::bf16, {hidden, inter});
  const Biases biases = biases_of(kName, layer.config(), gate_bias, up_bias, down_bias);
  const WithoutGil nogil;
  layer.load_expert(expert, g, u, d, biases);
}

void dequantize_expert(const MoeLayer& layer, int expert, const std::optional<OutArray>& gate, const OutArray& up, const OutArray& down) {
  const int hidden = layer.config().hidden, inter = layer.config().inter;
  TensorArg<OutArray> u("dequantize_expert", "up", up), d("dequantize_expert", "down", down);
  check_gate("dequantize_expert", gate, layer.config().activation.gated());
  float* g = data_of<float>("dequantize_expert", "gate", gate, Dtype::fp32, {inter, hidden});
  u.dtype({Dtype::fp32}).shape({inter, hidden}).contiguous();
  d.dtype({Dtype::fp32}).shape({hidden, inter}).contiguous();
  layer.dequantize(expert, g, u.data<float>(), d.data<float>());
}

void read_expert(const MoeLayer& layer, int expert, const OutArray& out) {
  TensorArg<OutArray> o("read_expert", "out", out);
  o.dtype({Dtype::uint8}).shape({static_cast<std::int64_t>(layer.expert_bytes())}).contiguous();
  const WithoutGil nogil;
  layer.read_expert(expert, o.data<std::byte>());
}

// `owner` lives as long as the layer (keep_alive), so it must own the memory; a capsule gives its memory up when it is read.
void attach(MoeLayer& layer, nb::object owner, const std::vector<int>& row, const MaybeIn& gate_bias, const MaybeIn& up_bias,
            const MaybeIn& down_bias) {
  require(!PyCapsule_CheckExact(owner.ptr()), ErrorKind::type, "[attach] packed: got a capsule, expected the array itself");
  const InArray packed = nb::cast<InArray>(owner);
  TensorArg<InArray> p("attach", "packed", packed);
  p.dtype({Dtype::uint8}).shape({-1, static_cast<std::int64_t>(layer.expert_bytes())}).contiguous();
  require(p.extent(0) <= 65536, ErrorKind::value, p.where(), ": got ", p.extent(0), " rows, expected at most 65536");
  const std::int64_t n = p.extent(0), inter = layer.config().inter, hidden = layer.config().hidden;
  const Biases biases{data_of<float>("attach", "gate_bias", gate_bias, Dtype::fp32, {n, inter}),
                      data_of<float>("attach", "up_bias", up_bias, Dtype::fp32, {n, inter}),
                      data_of<float>("attach", "down_bias", down_bias, Dtype::fp32, {n, hidden})};
  require(layer.config().activation.gated() || !biases.gate, ErrorKind::value,
          "[attach] gate_bias: got an array, expected none: the activation has no gate");
  const WithoutGil nogil;
  layer.attach(p.data<std::byte>(), static_cast<int>(n), row, biases);
}

Dropout dropout_of(const char* function, double p, std::uint64_t seed) {
  require(p >= 0.0 && p < 1.0, ErrorKind::value, "[", function, "] dropout: got ", p, ", expected 0 <= p < 1");
  return {p, seed};
}

void forward(const MoeLayer& layer, const InArray& hidden, const InArray& ids, const InArray& weights, const OutArray& out,
             const LoraAdapter* lora, double dropout, std::uint64_t seed) {
  const ForwardArgs args = forward_args("forward", layer, hidden, ids, weights);
  bf16* dst = forward_out("forward", layer, args, out);
  const Dropout drop = dropout_of("forward", dropout, seed);
  const WithoutGil nogil;
  layer.forward(args.hidden, args.routing, dst, lora, drop);
}

ForwardCache forward_train(const MoeLayer& layer, const InArray& hidden, const InArray& ids, const InArray& weights, const OutArray& out,
                           const LoraAdapter* lora, double dropout, std::uint64_t seed) {
  const ForwardArgs args = forward_args("forward_train", layer, hidden, ids, weights);
  bf16* dst = forward_out("forward_train", layer, args, out);
  const Dropout drop = dropout_of("forward_train", dropout, seed);
  const WithoutGil nogil;
  return layer.forward_train(args.hidden, args.routing, dst, lora, drop);
}

FloatOrBf16 float_or_bf16(const TensorArg<OutArray>& t) {
  if (t.is(Dtype::fp32)) return {t.data<float>(), nullptr};
  return {nullptr, t.data<bf16>()};
}

void backward(const MoeLayer& layer, const ForwardCache& cache, const InArray& grad_out, const LoraAdapter* lora,
              const std::optional<OutArray>& grad_in, const std::optional<OutArray>& grad_weights,
              const std::optional<std::vector<OutArray>>& lora_grads, const std::optional<std::vector<OutArray>>& base_grads) {
  const MoeConfig& c = layer.config();
  TensorArg<InArray> dy("backward", "grad_out", grad_out);
  dy.dtype({Dtype::bf16}).shape({cache.n_tokens, c.hidden}).rows_contiguous();
  Gradients grads{};
  if (grad_in) {
    TensorArg<OutArray> dx("backward", "grad_in", *grad_in);
    dx.dtype({Dtype::bf16, Dtype::fp32}).shape({cache.n_tokens, c.hidden}).contiguous();
    grads.input = float_or_bf16(dx);
  }
  if (grad_weights) {
    TensorArg<OutArray> dw("backward", "grad_weights", *grad_weights);
    grads.weights = dw.dtype({Dtype::fp32}).shape({cache.n_tokens, c.top_k}).contiguous().data<float>();
  }
  if (lora_grads) {
    require(lora != nullptr, ErrorKind::runtime, "LoRA weights not initialized: [backward] lora_grads need an adapter");
    const std::size_t first = lora->gated ? kGateA : kUpA;
    require(lora_grads->size() == 6 - first, ErrorKind::value, "[backward] lora_grads: got ", lora_grads->size(), " arrays, expected ",
            6 - first);
    for (std::size_t i = first; i < 6; ++i) {
      const auto [rows, columns] = lora->shape(static_cast<LoraTensor>(i));
      TensorArg<OutArray> g("backward", "lora_grads", (*lora_grads)[i - first]);
      g.dtype({Dtype::fp32}).shape({c.n_experts, rows, columns}).rows_contiguous();
      grads.lora[i] = {g.data<float>(), g.stride(0), g.stride(1)};
    }
  }
  if (base_grads) {
    const std::size_t first = c.activation.gated() ? 0 : 1;
    require(base_grads->size() == 3 - first, ErrorKind::value, "[backward] base_grads: got ", base_grads->size(), " arrays, expected ",
            3 - first);
    for (std::size_t i = first; i < 3; ++i) {
      TensorArg<OutArray> g("backward", "base_grads", (*base_grads)[i - first]);
      g.dtype({Dtype::fp32, Dtype::bf16}).shape({c.n_experts, i == 2 ? c.hidden : c.inter, i == 2 ? c.inter : c.hidden}).contiguous();
      grads.base[i] = float_or_bf16(g);
    }
  }
  const WithoutGil nogil;
  layer.backward(cache, {dy.data<bf16>(), dy.stride(0)}, lora, grads);
}

void update_lora(LoraAdapter& lora, SubPools& pool, const MaybeIn& gate_a, const MaybeIn& gate_b, const MaybeIn& up_a, const MaybeIn& up_b,
                 const MaybeIn& down_a, const MaybeIn& down_b) {
  const MaybeIn* arrays[6] = {&gate_a, &gate_b, &up_a, &up_b, &down_a, &down_b};
  static constexpr const char* names[6] = {"gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b"};
  std::array<StridedTensor, 6> tensors{};
  for (std::size_t i = 0; i < 6; ++i) {
    const bool exists = lora.has(static_cast<LoraTensor>(i));
    require(arrays[i]->has_value() == exists, ErrorKind::type, "[LoraAdapter.update] ", names[i], ": got ",
            exists ? "None, expected an array" : "an array, expected None: this adapter has no gate");
    if (!exists) continue;
    const auto [rows, columns] = lora.shape(static_cast<LoraTensor>(i));
    TensorArg<InArray> t("LoraAdapter.update", names[i], **arrays[i]);
    t.dtype({Dtype::bf16, Dtype::fp32}).shape({lora.n_experts, rows, columns});
    tensors[i] = {t.data<void>(), t.is(Dtype::fp32), {t.stride(0), t.stride(1), t.stride(2)}};
  }
  const WithoutGil nogil;
  lora.update(pool, tensors);
}

}  // namespace

void init_layer(nb::module_& m) {
  nb::class_<LoraAdapter>(m, "LoraAdapter")
      .def(nb::init<int, int, int, int, float, bool>(), nb::arg("n_experts"), nb::arg("hidden"), nb::arg("inter"), nb::arg("rank"),
           nb::arg("scaling"), nb::arg("gated") = true)
      .def("update", &update_lora, nb::arg("pool"), nb::arg("gate_a").none(), nb::arg("gate_b").none(), nb::arg("up_a").none(),
           nb::arg("up_b").none(), nb::arg("down_a").none(), nb::arg("down_b").none())
      .def_ro("rank", &LoraAdapter::rank)
      .def_ro("scaling", &LoraAdapter::scaling)
      .def_prop_ro("version", &LoraAdapter::version);
  nb::class_<ForwardCache>(m, "ForwardCache", nb::is_weak_referenceable())
      .def_prop_ro("nbytes", &ForwardCache::bytes)
      .def_ro("n_tokens", &ForwardCache::n_tokens);
  m.attr("LAYOUT_VERSION") = kLayoutVersion;
  nb::class_<MoeLayer>(m, "MoeLayer")
      .def(nb::new_(&make_layer), nb::arg("pool"), nb::arg("n_experts"), nb::arg("top_k"), nb::arg("hidden"), nb::arg("inter"),
           nb::arg("format"), nb::arg("isa") = "", nb::arg("chunk_tokens") = 0, nb::arg("on_gpu").none() = nb::none(),
           nb::arg("activation") = "silu", nb::arg("swiglu_limit") = 0.0f, nb::arg("swiglu_alpha") = 0.0f, nb::arg("down_format") = "",
           nb::arg("check_finite") = false)
      .def("load_expert", &load_expert, nb::arg("expert"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"),
           nb::arg("gate_bias").none() = nb::none(), nb::arg("up_bias").none() = nb::none(), nb::arg("down_bias").none() = nb::none())
      .def("load_expert_raw", &load_expert_raw, nb::arg("expert"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"),
           nb::arg("gate_bias").none() = nb::none(), nb::arg("up_bias").none() = nb::none(), nb::arg("down_bias").none() = nb::none())
      .def(
          "share_gpu_mask",
          [](MoeLayer& layer, nb::object owner) {
            require(!PyCapsule_CheckExact(owner.ptr()), ErrorKind::type, "[share_gpu_mask] mask: got a capsule, expected the array itself");
            const InArray array = nb::cast<InArray>(owner);
            TensorArg<InArray> mask("share_gpu_mask", "mask", array);
            mask.dtype({Dtype::boolean, Dtype::uint8}).shape({layer.config().n_experts}).contiguous();
            layer.share_gpu_mask(mask.data<std::uint8_t>());
          },
          nb::arg("mask"), nb::keep_alive<1, 2>())
      .def_prop_ro("loaded", &MoeLayer::loaded)
      .def("unload", &MoeLayer::unload)
      .def_prop_ro("packed_bytes", &MoeLayer::packed_bytes)
      .def_prop_ro("expert_bytes", &MoeLayer::expert_bytes)
      .def("read_expert", &read_expert, nb::arg("expert"), nb::arg("out"))
      .def("attach", &attach, nb::arg("packed"), nb::arg("row"), nb::arg("gate_bias").none() = nb::none(),
           nb::arg("up_bias").none() = nb::none(), nb::arg("down_bias").none() = nb::none(), nb::keep_alive<1, 2>())
      .def_prop_ro("parts",
                   [](const MoeLayer& l) {
                     std::vector<std::pair<int, int>> slices;
                     for (int p = 0; p < l.parts(); ++p) slices.emplace_back(l.slice(p).first, l.slice(p).inter);
                     return slices;
                   })
      .def_prop_ro("isa", [](const MoeLayer& l) { return std::string(isa_name(l.config().isa)); })
      .def_prop_ro("format", [](const MoeLayer& l) { return std::string(format_info(l.config().format).name); })
      .def_prop_ro("down_format", [](const MoeLayer& l) { return std::string(format_info(l.config().down_format).name); })
      .def("dequantize_expert", &dequantize_expert, nb::arg("expert"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"))
      .def("forward", &forward, nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"), nb::arg("lora").none() = nb::none(),
           nb::arg("dropout") = 0.0, nb::arg("seed") = 0)
      .def("forward_train", &forward_train, nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"),
           nb::arg("lora").none() = nb::none(), nb::arg("dropout") = 0.0, nb::arg("seed") = 0)
      .def("backward", &backward, nb::arg("cache"), nb::arg("grad_out"), nb::arg("lora").none(), nb::arg("grad_in").none(),
           nb::arg("grad_weights").none(), nb::arg("lora_grads").none(), nb::arg("base_grads").none() = nb::none());
}

}  // namespace ktmoe
