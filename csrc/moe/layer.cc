// Loading and the bookkeeping of a layer; the passes are in forward.cc and backward.cc.
#include "moe/layer.h"

#include <algorithm>

#include "moe/repack.h"

namespace ktmoe {

MoeLayer::MoeLayer(std::shared_ptr<ThreadPool> pool, MoeConfig config)
    : pool_(std::move(pool)),
      config_((config.validate(), std::move(config))),
      kernels_(kernels_for(config_.isa)),
      gate_up_(config_.activation.gated() ? PackedLayout::paired(config_.format, config_.inter, config_.hidden)
                                          : PackedLayout::plain(config_.format, config_.inter, config_.hidden)),
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
  biases_ = AlignedBuffer();
  at_.assign(static_cast<std::size_t>(config_.n_experts), nullptr);
  missing_ = static_cast<int>(std::count_if(slot_.begin(), slot_.end(), [](int s) { return s >= 0; }));
}

std::size_t MoeLayer::packed_bytes() const {
  const std::size_t each = expert_bytes_ + (biases_.data() ? sizeof(float) * bias_floats() : 0);
  return each * (at_.size() - static_cast<std::size_t>(std::count(at_.begin(), at_.end(), nullptr)));
}

Expert MoeLayer::expert(int e) const {
  const std::byte* at = at_[static_cast<std::size_t>(e)];
  const float* bias =
      biases_.data() ? biases_.as<float>() + bias_floats() * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]) : nullptr;
  return {PackedMatrix(gate_up_, at), PackedMatrix(down_, at + gate_up_.bytes), bias,
          bias ? bias + gate_up_.n_panels * kPanelColumns : nullptr};
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

// --- biases ---

std::size_t MoeLayer::bias_floats() const {
  return static_cast<std::size_t>(gate_up_.n_panels + down_.n_panels) * kPanelColumns;
}

void MoeLayer::check_biases(int e, const Biases& biases) const {
  require(config_.activation.gated() || !biases.gate, ErrorKind::value,
          "[load_expert] gate_bias: got an array, expected none: the activation has no gate");
  bool others = false;
  for (int i = 0; i < config_.n_experts; ++i) others |= i != e && at_[static_cast<std::size_t>(i)];
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

// --- packed bytes ---

void MoeLayer::read_expert(int e, std::byte* out) const {
  ThreadPool::Session session(*pool_, true);  // not while it is unloaded
  check_expert("read_expert", e);
  std::memcpy(out, at_[static_cast<std::size_t>(e)], expert_bytes_);
}

void MoeLayer::attach(const std::byte* packed, int n_rows, const std::vector<int>& row, const Biases& biases) {
  require(reinterpret_cast<std::uintptr_t>(packed) % 64 == 0, ErrorKind::value, "[attach] packed: got memory that is not 64-byte aligned");
  require(row.size() == slot_.size(), ErrorKind::value, "[attach] row: got ", row.size(), " entries, expected ", slot_.size());
  for (std::size_t e = 0; e < row.size(); ++e)
    require(slot_[e] < 0 || (row[e] >= 0 && row[e] < n_rows), ErrorKind::value, "[attach] row[", e, "]: got ", row[e], ", expected 0 to ",
            n_rows - 1);
  ThreadPool::Session session(*pool_);
  forget_weights();
  for (int e = 0; e < config_.n_experts; ++e) {
    if (config_.gpu(e)) continue;
    const std::ptrdiff_t r = row[static_cast<std::size_t>(e)];
    auto own = [&](const float* all, int n) { return all ? all + r * n : nullptr; };
    store_biases(e, {own(biases.gate, config_.inter), own(biases.up, config_.inter), own(biases.down, config_.hidden)});
    place(e, packed + expert_bytes_ * static_cast<std::size_t>(r));
  }
}

// --- loading ---

// gate_up, down(p0, p1, where the matrix begins) fill panels [p0, p1).
template <class GateUp, class Down>
void MoeLayer::fill_expert(const char* function, int e, const Biases& biases, GateUp gate_up, Down down) {
  require(e >= 0 && e < config_.n_experts, ErrorKind::value, "[", function, "] expert: got ", e, ", expected 0 to ", config_.n_experts - 1);
  require(!config_.gpu(e), ErrorKind::value, "[", function, "] expert ", e, " is on the GPU and has no memory here");
  ThreadPool::Session session(*pool_);
  check_biases(e, biases);
  if (!data_.data()) {
    const std::size_t experts = static_cast<std::size_t>(*std::max_element(slot_.begin(), slot_.end()) + 1);
    data_ = AlignedBuffer(checked_mul(expert_bytes_, experts));
  }
  store_biases(e, biases);  // the last thing that may run out of memory
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

void MoeLayer::load_expert(int e, const bf16* gate, const bf16* up, const bf16* down, const Biases& biases) {
  for (const PackedLayout* l : {&gate_up_, &down_})
    require(!format_info(l->format).published(), ErrorKind::value, "[load_expert] format ", format_info(l->format).name,
            " takes published bytes: expected load_expert_raw");
  const int hidden = config_.hidden, inter = config_.inter;
  fill_expert(
      "load_expert", e, biases,
      [&](int p0, int p1, std::byte* at) {
        if (gate)
          pack_matrix(kernels_, gate_up_, p0, p1, hidden, PairedRows{gate, up, hidden, inter}, at);
        else
          pack_matrix(kernels_, gate_up_, p0, p1, hidden, PlainRows{up, hidden, inter}, at);
      },
      [&](int p0, int p1, std::byte* at) { pack_matrix(kernels_, down_, p0, p1, inter, PlainRows{down, inter, hidden}, at); });
}

void MoeLayer::load_expert_raw(int e, const RawBlock& gate, const RawBlock& up, const RawBlock& down, const Biases& biases) {
  const int hidden = config_.hidden, inter = config_.inter;
  auto bf16_of = [](const RawBlock& raw) { return reinterpret_cast<const bf16*>(raw.part[0]); };
  auto plain = [&](const char* name, const RawBlock& raw, int n, const PackedLayout& layout, int p0, int p1, std::byte* at) {
    if (layout.format == WeightFormat::bf16)
      return pack_matrix(kernels_, layout, p0, p1, layout.k, PlainRows{bf16_of(raw), layout.k, n}, at);
    repack_matrix(layout, p0, p1, [&](int p, int t) { return RawRows{name, raw, p * kPanelColumns + t * kTileColumns, n}; }, at);
  };
  fill_expert(
      "load_expert_raw", e, biases,
      [&](int p0, int p1, std::byte* at) {
        if (!gate.part[0]) return plain("up", up, inter, gate_up_, p0, p1, at);
        if (gate_up_.format == WeightFormat::bf16)
          return pack_matrix(kernels_, gate_up_, p0, p1, hidden, PairedRows{bf16_of(gate), bf16_of(up), hidden, inter}, at);
        repack_matrix(
            gate_up_, p0, p1,
            [&](int p, int t) {
              return t == 0 ? RawRows{"gate", gate, p * kTileColumns, inter} : RawRows{"up", up, p * kTileColumns, inter};
            },
            at);
      },
      [&](int p0, int p1, std::byte* at) { plain("down", down, hidden, down_, p0, p1, at); });
}

void MoeLayer::dequantize(int e, float* gate, float* up, float* down) const {
  check_expert("dequantize_expert", e);
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
