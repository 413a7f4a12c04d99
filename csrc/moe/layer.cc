// Loading and the bookkeeping of a layer; the passes are in forward.cc and backward.cc.
#include "moe/layer.h"

#include <algorithm>

namespace ktmoe {

MoeLayer::MoeLayer(std::shared_ptr<ThreadPool> pool, MoeConfig config)
    : pool_(std::move(pool)),
      config_((config.validate(), std::move(config))),
      kernels_(kernels_for(config_.isa)),
      gate_up_(PackedLayout::paired(config_.format, config_.inter, config_.hidden)),
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
  at_.assign(static_cast<std::size_t>(config_.n_experts), nullptr);
  missing_ = static_cast<int>(std::count_if(slot_.begin(), slot_.end(), [](int s) { return s >= 0; }));
}

std::size_t MoeLayer::packed_bytes() const {
  return expert_bytes_ * (at_.size() - static_cast<std::size_t>(std::count(at_.begin(), at_.end(), nullptr)));
}

Expert MoeLayer::expert(int e) const {
  const std::byte* at = at_[static_cast<std::size_t>(e)];
  return {PackedMatrix(gate_up_, at), PackedMatrix(down_, at + gate_up_.bytes)};
}

void MoeLayer::check_expert(const char* function, int e) const {
  require(e >= 0 && e < config_.n_experts && at_[static_cast<std::size_t>(e)], ErrorKind::value, "[", function, "] expert: got ", e,
          ", expected one that is loaded");
}

void MoeLayer::place(int e, const std::byte* at) {
  if (!at_[static_cast<std::size_t>(e)]) --missing_;
  at_[static_cast<std::size_t>(e)] = at;
}

void MoeLayer::read_expert(int e, std::byte* out) const {
  ThreadPool::Session session(*pool_, true);  // not while it is unloaded
  check_expert("read_expert", e);
  std::memcpy(out, at_[static_cast<std::size_t>(e)], expert_bytes_);
}

void MoeLayer::attach(const std::byte* packed, int n_rows, const std::vector<int>& row) {
  require(reinterpret_cast<std::uintptr_t>(packed) % 64 == 0, ErrorKind::value, "[attach] packed: got memory that is not 64-byte aligned");
  require(row.size() == slot_.size(), ErrorKind::value, "[attach] row: got ", row.size(), " entries, expected ", slot_.size());
  for (std::size_t e = 0; e < row.size(); ++e)
    require(slot_[e] < 0 || (row[e] >= 0 && row[e] < n_rows), ErrorKind::value, "[attach] row[", e, "]: got ", row[e], ", expected 0 to ",
            n_rows - 1);
  ThreadPool::Session session(*pool_);
  forget_weights();
  for (int e = 0; e < config_.n_experts; ++e)
    if (!config_.gpu(e)) place(e, packed + expert_bytes_ * static_cast<std::size_t>(row[static_cast<std::size_t>(e)]));
}

void MoeLayer::load_expert(int e, const bf16* gate, const bf16* up, const bf16* down) {
  require(e >= 0 && e < config_.n_experts, ErrorKind::value, "[load_expert] expert: got ", e, ", expected 0 to ", config_.n_experts - 1);
  require(!config_.gpu(e), ErrorKind::value, "[load_expert] expert ", e, " is on the GPU and has no memory here");
  ThreadPool::Session session(*pool_);
  if (!data_.data()) {
    const std::size_t experts = static_cast<std::size_t>(*std::max_element(slot_.begin(), slot_.end()) + 1);
    data_ = AlignedBuffer(checked_mul(expert_bytes_, experts));
  }
  std::byte* at = data_.data() + expert_bytes_ * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]);
  constexpr int kUnit = 4;  // panels of one task
  const int gate_units = ceil_div(gate_up_.n_panels, kUnit), units = gate_units + ceil_div(down_.n_panels, kUnit);
  session.parallel_for(units, [&](int unit, int) {
    const bool is_down = unit >= gate_units;
    const PackedLayout& layout = is_down ? down_ : gate_up_;
    const int p0 = kUnit * (is_down ? unit - gate_units : unit), p1 = std::min(p0 + kUnit, layout.n_panels);
    if (is_down)
      pack_matrix(kernels_, layout, p0, p1, config_.inter, PlainRows{down, config_.inter, config_.hidden}, at + gate_up_.bytes);
    else
      pack_matrix(kernels_, layout, p0, p1, config_.hidden, PairedRows{gate, up, config_.hidden, config_.inter}, at);
  });
  place(e, at);
}

void MoeLayer::dequantize(int e, float* gate, float* up, float* down) const {
  check_expert("dequantize_expert", e);
  const Expert x = expert(e);
  const std::ptrdiff_t hidden = config_.hidden, inter = config_.inter;
  for (int i = 0; i < inter; ++i)
    for (int j = 0; j < hidden; ++j) {
      gate[i * hidden + j] = x.gate_up.weight(i / kTileColumns, i % kTileColumns, j);
      up[i * hidden + j] = x.gate_up.weight(i / kTileColumns, kTileColumns + i % kTileColumns, j);
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
