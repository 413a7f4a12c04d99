// Loading and the bookkeeping of a layer; the passes are in forward.cc and backward.cc.
#include "moe/layer.h"

#include <algorithm>

namespace ktmoe {

MoeLayer::MoeLayer(std::shared_ptr<ThreadPool> pool, MoeConfig config)
    : pool_(std::move(pool)),
      config_((config.validate(), std::move(config))),
      kernels_(kernels_for(config_.isa)),
      gate_up_(config_.activation.gated() ? PackedLayout::paired(config_.format, config_.inter, config_.hidden)
                                          : PackedLayout::plain(config_.format, config_.inter, config_.hidden)),
      down_(PackedLayout::plain(config_.format, config_.hidden, config_.inter)),
      expert_bytes_(round_up_bytes(checked_add(gate_up_.bytes, down_.bytes), 4096)),
      slot_(static_cast<std::size_t>(config_.n_experts), -1) {
  int next = 0;
  for (int e = 0; e < config_.n_experts; ++e)
    if (!config_.gpu(e)) slot_[static_cast<std::size_t>(e)] = next++;
  forget_weights();
}

void MoeLayer::unload() {
  ThreadPool::Session session(*pool_);  // not under a running forward
  forget_weights();
}

void MoeLayer::forget_weights() {
  data_ = AlignedBuffer();
  biases_ = AlignedBuffer();
  has_.assign(static_cast<std::size_t>(config_.n_experts), 0);
  missing_ = static_cast<int>(std::count_if(slot_.begin(), slot_.end(), [](int s) { return s >= 0; }));
}

std::size_t MoeLayer::packed_bytes() const {
  const std::size_t each = expert_bytes_ + (biases_.data() ? sizeof(float) * bias_floats() : 0);
  return each * static_cast<std::size_t>(std::count(has_.begin(), has_.end(), std::uint8_t{1}));
}

std::size_t MoeLayer::expert_offset(int e) const {
  return expert_bytes_ * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]);
}

Expert MoeLayer::expert(int e) const {
  const std::byte* at = data_.data() + expert_offset(e);
  const float* bias =
      biases_.data() ? biases_.as<float>() + bias_floats() * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]) : nullptr;
  return {PackedMatrix(gate_up_, at), PackedMatrix(down_, at + gate_up_.bytes), bias,
          bias ? bias + gate_up_.n_panels * kPanelColumns : nullptr};
}

std::size_t MoeLayer::bias_floats() const {
  return static_cast<std::size_t>(gate_up_.n_panels + down_.n_panels) * kPanelColumns;
}

void MoeLayer::check_biases(int e, const Biases& biases) const {
  require(config_.activation.gated() || !biases.gate, ErrorKind::value,
          "[load_expert] gate_bias: got an array, expected none: the activation has no gate");
  bool others = false;
  for (int i = 0; i < config_.n_experts; ++i) others |= i != e && has_[static_cast<std::size_t>(i)];
  require(!others || biases.any() == (biases_.data() != nullptr), ErrorKind::value, "[load_expert] biases of expert ", e, ": got ",
          biases.any() ? "some" : "none", ", expected ", biases.any() ? "none" : "some", " as for the experts loaded before");
}

void MoeLayer::store_biases(int e, const Biases& biases) {
  if (!biases.any()) {
    biases_ = AlignedBuffer();
    return;
  }
  const std::size_t slots = static_cast<std::size_t>(*std::max_element(slot_.begin(), slot_.end()) + 1);
  if (!biases_.data()) biases_ = AlignedBuffer(checked_mul(checked_mul(bias_floats(), sizeof(float)), slots));
  float* bias = biases_.as<float>() + bias_floats() * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]);
  std::fill_n(bias, bias_floats(), 0.0f);
  const int h = config_.activation.h_per_panel();  // columns of a panel that belong to up
  for (int i = 0; i < config_.inter; ++i) {
    float* panel = bias + i / h * kPanelColumns;
    if (biases.gate) panel[i % h] = biases.gate[i];
    if (biases.up) panel[kPanelColumns - h + i % h] = biases.up[i];
  }
  if (biases.down) std::copy_n(biases.down, config_.hidden, bias + gate_up_.n_panels * kPanelColumns);
}

void MoeLayer::load_expert(int e, const bf16* gate, const bf16* up, const bf16* down, const Biases& biases) {
  require(e >= 0 && e < config_.n_experts, ErrorKind::value, "[load_expert] expert: got ", e, ", expected 0 to ", config_.n_experts - 1);
  require(!config_.gpu(e), ErrorKind::value, "[load_expert] expert ", e, " is on the GPU and has no memory here");
  ThreadPool::Session session(*pool_);
  check_biases(e, biases);
  if (!data_.data()) {
    const std::size_t experts = static_cast<std::size_t>(*std::max_element(slot_.begin(), slot_.end()) + 1);
    data_ = AlignedBuffer(checked_mul(expert_bytes_, experts));
  }
  store_biases(e, biases);  // the last thing that may run out of memory
  std::byte* at = data_.data() + expert_offset(e);
  constexpr int kUnit = 4;  // panels of one task
  const int gate_units = ceil_div(gate_up_.n_panels, kUnit), units = gate_units + ceil_div(down_.n_panels, kUnit);
  session.parallel_for(units, [&](int unit, int) {
    const bool is_down = unit >= gate_units;
    const PackedLayout& layout = is_down ? down_ : gate_up_;
    const int p0 = kUnit * (is_down ? unit - gate_units : unit), p1 = std::min(p0 + kUnit, layout.n_panels);
    if (is_down)
      pack_matrix(kernels_, layout, p0, p1, config_.inter, PlainRows{down, config_.inter, config_.hidden}, at + gate_up_.bytes);
    else if (config_.activation.gated())
      pack_matrix(kernels_, layout, p0, p1, config_.hidden, PairedRows{gate, up, config_.hidden, config_.inter}, at);
    else
      pack_matrix(kernels_, layout, p0, p1, config_.hidden, PlainRows{up, config_.hidden, config_.inter}, at);
  });
  if (!has_[static_cast<std::size_t>(e)]) --missing_;
  has_[static_cast<std::size_t>(e)] = 1;
}

void MoeLayer::dequantize(int e, float* gate, float* up, float* down) const {
  require(e >= 0 && e < config_.n_experts && has_[static_cast<std::size_t>(e)], ErrorKind::value, "[dequantize_expert] expert: got ", e,
          ", expected one that is loaded");
  const Expert x = expert(e);
  const std::ptrdiff_t hidden = config_.hidden, inter = config_.inter;
  const int h = config_.activation.h_per_panel();
  for (int i = 0; i < inter; ++i)
    for (int j = 0; j < hidden; ++j) {
      if (gate) gate[i * hidden + j] = x.gate_up.weight(i / h, i % h, j);
      up[i * hidden + j] = x.gate_up.weight(i / h, kPanelColumns - h + i % h, j);
      down[j * inter + i] = x.down.weight(j / kPanelColumns, j % kPanelColumns, i);
    }
}

void MoeLayer::check_ready(const char* function, const LoraAdapter* lora) const {
  require(loaded(), ErrorKind::runtime, "Weights not loaded: [", function, "] ", missing_, " of ", config_.n_experts,
          " experts are missing");
  if (!lora) return;
  require(lora->version() > 0, ErrorKind::runtime, "LoRA weights not initialized: [", function, "] the adapter was never updated");
  require(lora->n_experts == config_.n_experts && lora->hidden == config_.hidden && lora->inter == config_.inter, ErrorKind::value, "[",
          function, "] lora shape: got ", lora->n_experts, " x ", lora->hidden, " x ", lora->inter, ", expected ", config_.n_experts, " x ",
          config_.hidden, " x ", config_.inter);
  require(lora->gated == config_.activation.gated(), ErrorKind::value, "[", function, "] lora: got an adapter ",
          lora->gated ? "with" : "without", " gate matrices, expected one ", lora->gated ? "without" : "with");
}

// The fp32 rows of a pass (one per token and slot) are its largest buffer; this bounds it.
int MoeLayer::tokens_per_pass() const {
  constexpr std::size_t kRowBytes = std::size_t{384} << 20;
  const std::size_t per_token =
      static_cast<std::size_t>(config_.top_k) * static_cast<std::size_t>(down_.n_panels) * kPanelColumns * sizeof(float);
  const int fits = static_cast<int>(std::clamp<std::size_t>(kRowBytes / per_token, 256, std::size_t{1} << 20));
  return config_.chunk_tokens > 0 ? std::min(config_.chunk_tokens, fits) : fits;
}

}  // namespace ktmoe
