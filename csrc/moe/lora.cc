#include "moe/lora.h"

#include <initializer_list>

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

// Packs `count` experts that follow each other.
class LoraAdapter::Packer {
 public:
  // PEFT has the experts of a B side by side: a line of memory then belongs to this many of them, which are packed together.
  static constexpr int kSideBySide = kTileColumns;
  static bool side_by_side(const StridedTensor& t) { return t.data && t.stride[0] == 1 && t.stride[2] != 1; }

  Packer(LoraAdapter& lora, const KernelTable& kernels, Scratch& scratch, const std::array<StridedTensor, 6>& tensors, int first, int count)
      : lora_(lora), k_(kernels), scratch_(scratch), tensors_(tensors), first_(first), count_(count) {}

  void pack() {
    const int rank = lora_.rank, both = lora_.gate_up_rank();
    if (lora_.gated) {
      pack_a(0, both, lora_.hidden, {kGateA, kUpA});
      pack_b(1, both, {kGateB, kUpB});
    } else {
      pack_a(0, both, lora_.hidden, {kUpA});
      pack_b(1, both, {kUpB});
    }
    pack_a(2, rank, lora_.inter, {kDownA});
    pack_b(3, rank, {kDownB});
  }

 private:
  std::byte* packed(int e, std::size_t matrix) const {
    std::byte* at = lora_.data_.data() + lora_.expert_bytes_ * static_cast<std::size_t>(first_ + e);
    for (std::size_t i = 0; i < matrix; ++i) at += lora_.layouts_[i].bytes;
    return at;
  }

  // One below the other, made dense. Rows, here and below experts, are a line apart, or they compete for the same sets of a cache.
  static constexpr int kLine = 64 / sizeof(bf16);
  void pack_a(std::size_t matrix, int rows, int columns, std::initializer_list<LoraTensor> tensors) {
    const int ld = columns + kLine;
    bf16* dense = scratch_.take<bf16>(static_cast<std::size_t>(rows) * static_cast<std::size_t>(ld));
    const PackedLayout& layout = lora_.layouts_[matrix];
    for (int e = 0; e < count_; ++e) {
      bf16* dst = dense;
      for (const LoraTensor t : tensors)
        for (int i = 0; i < lora_.rank; ++i, dst += ld) tensors_[t].from(first_ + e, i, 0).copy(k_, 2, columns, dst);
      pack_matrix(k_, layout, 0, layout.n_panels, ld, PlainRows{dense, ld, rows}, packed(e, matrix));
    }
  }

  // A panel of all experts at a time. Two tensors make a paired matrix: the tiles of each have zeros where U is that of the other.
  void pack_b(std::size_t matrix, int columns, std::initializer_list<LoraTensor> tensors) {
    const PackedLayout& layout = lora_.layouts_[matrix];
    const bool paired = tensors.size() == 2;
    const int n = lora_.shape(*tensors.begin())[0];
    const std::ptrdiff_t tile = static_cast<std::ptrdiff_t>(kTileColumns) * columns;
    const std::ptrdiff_t expert = 2 * tile + kLine;
    bf16* dense = scratch_.take<bf16>(static_cast<std::size_t>(expert * count_));
    std::fill_n(dense, expert * count_, bf16{});
    for (int p = 0; p < layout.n_panels; ++p) {
      int rows[2];
      for (int t = 0; t < 2; ++t) {
        const int first = paired ? p * kTileColumns : p * kPanelColumns + t * kTileColumns;
        rows[t] = std::clamp(n - first, 0, kTileColumns);
        copy_rows(tensors_[*(tensors.begin() + (paired ? t : 0))], first, rows[t], dense + t * tile + (paired ? t * lora_.rank : 0),
                  columns, expert);
      }
      for (int e = 0; e < count_; ++e) {
        auto row_of = [&](int, int t) { return std::pair<const bf16*, int>{dense + e * expert + t * tile, rows[t]}; };
        pack_matrix(k_, layout, p, p + 1, columns, row_of, packed(e, matrix));
      }
    }
  }

  // To `dst` those of the first expert, rows `ld` apart, and so on.
  void copy_rows(const StridedTensor& t, int first, int rows, bf16* dst, int ld, std::ptrdiff_t expert) const {
    for (int i = 0; i < rows; ++i, dst += ld) {
      if (!side_by_side(t)) {
        for (int e = 0; e < count_; ++e) t.from(first_ + e, first + i, 0).copy(k_, 2, lora_.rank, dst + e * expert);
        continue;
      }
      for (int j = 0; j < lora_.rank; ++j) {
        bf16 line[kSideBySide];
        t.from(first_, first + i, j).copy(k_, 0, count_, line);
        for (int e = 0; e < count_; ++e) dst[e * expert + j] = line[e];
      }
    }
  }

  LoraAdapter& lora_;
  const KernelTable& k_;
  Scratch& scratch_;
  const std::array<StridedTensor, 6>& tensors_;
  const int first_, count_;
};

void LoraAdapter::update(SubPools& pools, const std::array<StridedTensor, 6>& tensors) {
  const KernelTable& kernels = kernels_for(active_isa());
  const bool together = std::any_of(tensors.begin(), tensors.end(), Packer::side_by_side);
  const int step = together ? Packer::kSideBySide : 1;
  SubPools::Session session(pools, pools.count());
  session.parallel_for(ceil_div(n_experts, step), [&](int i, Scratch& scratch) {
    Packer(*this, kernels, scratch, tensors, i * step, std::min(step, n_experts - i * step)).pack();
  });
  version_ = next_serial_number();
}

}  // namespace ktmoe
