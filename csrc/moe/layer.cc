// Loading and the bookkeeping of a layer; the passes are in forward.cc and backward.cc.
#include "moe/layer.h"

#include <algorithm>

#include "moe/repack.h"

namespace ktmoe {

MoeLayer::MoeLayer(std::shared_ptr<ThreadPool> pool, MoeConfig config)
    : pool_(std::move(pool)),
      config_((config.validate(), std::move(config))),
      kernels_(kernels_for(config_.isa)),
      gate_up_(PackedLayout::paired(config_.format, config_.inter, config_.hidden)),
      down_(PackedLayout::plain(config_.down_format, config_.hidden, config_.inter)),
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
  const std::byte*& here = at_[static_cast<std::size_t>(e)];
  missing_ += (here != nullptr) - (at != nullptr);
  here = at;
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

// gate_up, down(p0, p1, where the matrix begins) fill panels [p0, p1).
template <class GateUp, class Down>
void MoeLayer::fill_expert(const char* function, int e, GateUp gate_up, Down down) {
  require(e >= 0 && e < config_.n_experts, ErrorKind::value, "[", function, "] expert: got ", e, ", expected 0 to ", config_.n_experts - 1);
  require(!config_.gpu(e), ErrorKind::value, "[", function, "] expert ", e, " is on the GPU and has no memory here");
  ThreadPool::Session session(*pool_);
  if (!data_.data()) {
    const std::size_t experts = static_cast<std::size_t>(*std::max_element(slot_.begin(), slot_.end()) + 1);
    data_ = AlignedBuffer(checked_mul(expert_bytes_, experts));
  }
  std::byte* at = data_.data() + expert_bytes_ * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]);
  place(e, nullptr);        // until all of it is there
  constexpr int kUnit = 4;  // panels of one task
  const int gate_units = ceil_div(gate_up_.n_panels, kUnit), units = gate_units + ceil_div(down_.n_panels, kUnit);
  session.parallel_for(units, [&](int unit, int) {
    const bool is_down = unit >= gate_units;
    const int p0 = kUnit * (is_down ? unit - gate_units : unit);
    if (is_down)
      down(p0, std::min(p0 + kUnit, down_.n_panels), at + gate_up_.bytes);
    else
      gate_up(p0, std::min(p0 + kUnit, gate_up_.n_panels), at);
  });
  place(e, at);
}

void MoeLayer::load_expert(int e, const bf16* gate, const bf16* up, const bf16* down) {
  for (const PackedLayout* l : {&gate_up_, &down_})
    require(!format_info(l->format).published(), ErrorKind::value, "[load_expert] format ", format_info(l->format).name,
            " takes published bytes: expected load_expert_raw");
  const std::ptrdiff_t hidden = config_.hidden, inter = config_.inter;
  fill_expert(
      "load_expert", e,
      [&](int p0, int p1, std::byte* at) {
        pack_matrix(kernels_, gate_up_, p0, p1, hidden, PairedRows{gate, up, hidden, config_.inter}, at);
      },
      [&](int p0, int p1, std::byte* at) { pack_matrix(kernels_, down_, p0, p1, inter, PlainRows{down, inter, config_.hidden}, at); });
}

void MoeLayer::load_expert_raw(int e, const RawBlock& gate, const RawBlock& up, const RawBlock& down) {
  auto matrix = [&](const PackedLayout& layout, auto pick, auto rows) {
    return [=, this, &layout](int p0, int p1, std::byte* at) {
      if (layout.format == WeightFormat::bf16)
        pack_matrix(kernels_, layout, p0, p1, layout.k, rows, at);
      else
        repack_matrix(layout, p0, p1, pick, at);
    };
  };
  auto bf16_of = [](const RawBlock& raw) { return reinterpret_cast<const bf16*>(raw.part[0]); };
  fill_expert(
      "load_expert_raw", e,
      matrix(
          gate_up_,
          [this, gate, up](int p, int t) { return RawRows{t == 0 ? "gate" : "up", t == 0 ? gate : up, p * kTileColumns, config_.inter}; },
          PairedRows{bf16_of(gate), bf16_of(up), config_.hidden, config_.inter}),
      matrix(
          down_, [this, down](int p, int t) { return RawRows{"down", down, p * kPanelColumns + t * kTileColumns, config_.hidden}; },
          PlainRows{bf16_of(down), config_.inter, config_.hidden}));
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
