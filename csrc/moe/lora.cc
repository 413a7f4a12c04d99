#include "moe/lora.h"

#include "base/serial_number.h"

namespace ktmoe {

LoraAdapter::LoraAdapter(int n_experts, int hidden, int inter, int rank, float scaling, bool gated)
    : n_experts(n_experts), hidden(hidden), inter(inter), rank(rank), scaling(scaling), gated(gated) {
  require(rank >= 1 && rank <= 4096, ErrorKind::value, "[LoraAdapter] rank: got ", rank, ", expected 1 to 4096");
  require(n_experts >= 1 && hidden >= 1 && inter >= 1, ErrorKind::value, "[LoraAdapter] shape: got n_experts ", n_experts, ", hidden ",
          hidden, ", inter ", inter, ", expected positive numbers");
  const auto f = WeightFormat::bf16;
  layouts_ = {PackedLayout::plain(f, gate_up_rank(), hidden),
              gated ? PackedLayout::paired(f, inter, 2 * rank) : PackedLayout::plain(f, inter, rank), PackedLayout::plain(f, rank, inter),
              PackedLayout::plain(f, hidden, rank)};
  for (const auto& l : layouts_) expert_bytes_ = checked_add(expert_bytes_, l.bytes);
  data_ = AlignedBuffer(checked_mul(expert_bytes_, static_cast<std::size_t>(n_experts)));
}

std::array<int, 2> LoraAdapter::shape(LoraTensor t) const {
  switch (t) {
    case kGateA:
    case kUpA:
      return {rank, hidden};
    case kGateB:
    case kUpB:
      return {inter, rank};
    case kDownA:
      return {rank, inter};
    case kDownB:
      return {hidden, rank};
  }
  return {0, 0};
}

LoraExpert LoraAdapter::expert(int e, const Slice& slice) const {
  const std::byte* at = data_.data() + expert_bytes_ * static_cast<std::size_t>(e);
  std::array<PackedLayout, 4> views = layouts_;
  const std::byte* data[4];
  for (std::size_t i = 0; i < 4; at += layouts_[i++].bytes) data[i] = at;

  const int h = gated ? kTileColumns : kPanelColumns;  // rows of B in a panel
  views[1].n_panels = ceil_div(slice.inter, h);
  data[1] += layouts_[1].panel_stride * static_cast<std::size_t>(slice.first / h);
  const FormatInfo& info = format_info(layouts_[2].format);
  views[2].k = slice.inter;
  views[2].k_steps = ceil_div(slice.inter, info.k_step);
  data[2] += static_cast<std::ptrdiff_t>(slice.first / info.k_step) * 2 * info.tile_bytes;
  return {PackedMatrix(views[0], data[0]), PackedMatrix(views[1], data[1]), PackedMatrix(views[2], data[2]),
          PackedMatrix(views[3], data[3])};
}

void StridedTensor::copy(const KernelTable& kernels, int dimension, int n, bf16* dst) const {
  const std::int64_t step = stride[dimension];
  const auto* floats = static_cast<const float*>(data);
  const auto* halves = static_cast<const bf16*>(data);
  if (step == 1 && is_fp32) return kernels.round_row(floats, n, dst);
  if (step == 1) return static_cast<void>(std::copy_n(halves, n, dst));
  for (int i = 0; i < n; ++i) dst[i] = is_fp32 ? to_bf16(floats[i * step]) : halves[i * step];
}

// Packs some experts that follow each other. Each matrix is first made dense, as bf16 and zero where nothing is copied.
class LoraAdapter::Packer {
 public:
  // PEFT has the experts of a B side by side: a line of memory then belongs to this many of them, which are packed together.
  static constexpr int kSideBySide = kTileColumns;
  static bool side_by_side(const StridedTensor& t) { return t.data && t.stride[0] == 1 && t.stride[2] != 1; }

  Packer(LoraAdapter& lora, const KernelTable& kernels, Scratch& scratch, const std::array<StridedTensor, 6>& tensors, int first, int count)
      : lora_(lora), k_(kernels), tensors_(tensors), first_(first), both_(lora.gate_up_rank()) {
    for (const LoraTensor t : {kGateA, kGateB, kUpA, kUpB, kDownA, kDownB})
      if (side_by_side(tensors[t])) take_apart(t, count, scratch);
    auto dense = [&](int rows, int columns) {
      return scratch.take<bf16>(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
    };
    a_ = dense(both_, lora.hidden), up_ = dense(lora.inter, both_), gate_ = dense(lora.inter, both_);
    down_a_ = dense(lora.rank, lora.inter), down_b_ = dense(lora.hidden, lora.rank);
    for (bf16* d : {up_, gate_}) std::fill_n(d, static_cast<std::ptrdiff_t>(lora.inter) * both_, bf16{});
    for (int i = 0; i < count; ++i) pack(i);
  }

 private:
  // The matrices of `count` experts, one behind the other.
  void take_apart(LoraTensor t, int count, Scratch& scratch) {
    const auto [rows, columns] = lora_.shape(t);
    // A line of padding, so that those of all experts do not compete for the same sets of a cache.
    const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(rows) * columns + 32;
    bf16* apart = scratch.take<bf16>(static_cast<std::size_t>(size * count));
    bf16 line[kSideBySide];
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        tensors_[t].from(first_, i, j).copy(k_, 0, count, line);
        for (int e = 0; e < count; ++e) apart[e * size + static_cast<std::ptrdiff_t>(i) * columns + j] = line[e];
      }
    tensors_[t] = {apart, false, {size, columns, 1}};
    own_[t] = true;
  }

  void pack(int i) {
    std::byte* at = lora_.data_.data() + lora_.expert_bytes_ * static_cast<std::size_t>(first_ + i);
    auto copy = [&](LoraTensor t, bf16* dst, int ld) {
      const auto [rows, columns] = lora_.shape(t);
      for (int row = 0; row < rows; ++row, dst += ld) tensors_[t].from(own_[t] ? i : first_ + i, row, 0).copy(k_, 2, columns, dst);
    };
    auto pack = [&](const PackedLayout& layout, int ld, auto rows) {
      pack_matrix(k_, layout, 0, layout.n_panels, ld, rows, at);
      at += layout.bytes;
    };
    const int hidden = lora_.hidden, inter = lora_.inter, rank = lora_.rank, before_up = both_ - rank;
    if (lora_.gated) copy(kGateA, a_, hidden);
    copy(kUpA, a_ + static_cast<std::ptrdiff_t>(before_up) * hidden, hidden);
    pack(lora_.layouts_[0], hidden, PlainRows{a_, hidden, both_});
    copy(kUpB, up_ + before_up, both_);
    if (lora_.gated) {
      copy(kGateB, gate_, both_);
      pack(lora_.layouts_[1], both_, PairedRows{gate_, up_, both_, inter});
    } else {
      pack(lora_.layouts_[1], both_, PlainRows{up_, both_, inter});
    }
    copy(kDownA, down_a_, inter);
    pack(lora_.layouts_[2], inter, PlainRows{down_a_, inter, rank});
    copy(kDownB, down_b_, rank);
    pack(lora_.layouts_[3], rank, PlainRows{down_b_, rank, hidden});
  }

  LoraAdapter& lora_;
  const KernelTable& k_;
  std::array<StridedTensor, 6> tensors_;
  std::array<bool, 6> own_{};  // taken apart: counted from the first of these experts
  const int first_, both_;
  bf16 *a_ = nullptr, *up_ = nullptr, *gate_ = nullptr, *down_a_ = nullptr, *down_b_ = nullptr;
};

void LoraAdapter::update(SubPools& pools, const std::array<StridedTensor, 6>& tensors) {
  const KernelTable& kernels = kernels_for(active_isa());
  const int together = std::any_of(tensors.begin(), tensors.end(), Packer::side_by_side) ? Packer::kSideBySide : 1;
  SubPools::Session session(pools, pools.count());
  session.parallel_for(ceil_div(n_experts, together), [&](int i, Scratch& scratch) {
    Packer(*this, kernels, scratch, tensors, i * together, std::min(together, n_experts - i * together));
  });
  version_ = next_serial_number();
}

}  // namespace ktmoe
