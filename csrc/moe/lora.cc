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

void LoraAdapter::update(SubPools& pools, const std::array<StridedTensor, 6>& tensors) {
  const KernelTable& kernels = kernels_for(active_isa());
  SubPools::Session session(pools, pools.count());
  session.parallel_for(n_experts, [&](int e, Scratch& scratch) { pack_expert(kernels, scratch, e, tensors); });
  version_ = next_serial_number();
}

void LoraAdapter::pack_expert(const KernelTable& kernels, Scratch& scratch, int e, const std::array<StridedTensor, 6>& tensors) {
  std::byte* at = data_.data() + expert_bytes_ * static_cast<std::size_t>(e);
  // Each matrix is first made dense: `columns` wide, `rows` tall, zero where nothing is copied.
  auto dense = [&](int rows, int columns) {
    bf16* d = scratch.take<bf16>(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
    std::memset(d, 0, sizeof(bf16) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
    return d;
  };
  auto copy = [&](LoraTensor t, bf16* dst, int ld) {
    const auto [rows, columns] = shape(t);
    const StridedTensor& src = tensors[t];
    for (int i = 0; i < rows; ++i, dst += ld) {
      if (src.is_fp32 && src.stride[2] == 1)
        kernels.round_row(static_cast<const float*>(src.data) + e * src.stride[0] + i * src.stride[1], columns, dst);
      else
        for (int j = 0; j < columns; ++j) dst[j] = to_bf16(src.at(e, i, j));
    }
  };
  auto pack = [&](const PackedLayout& layout, int ld, auto rows) {
    pack_matrix(kernels, layout, 0, layout.n_panels, ld, rows, at);
    at += layout.bytes;
  };

  const int both = gate_up_rank(), before_up = both - rank;
  bf16* a = dense(both, hidden);
  if (gated) copy(kGateA, a, hidden);
  copy(kUpA, a + static_cast<std::ptrdiff_t>(before_up) * hidden, hidden);
  pack(layouts_[0], hidden, PlainRows{a, hidden, both});

  bf16* up = dense(inter, both);
  copy(kUpB, up + before_up, both);
  if (gated) {
    bf16* gate = dense(inter, both);
    copy(kGateB, gate, both);
    pack(layouts_[1], both, PairedRows{gate, up, both, inter});
  } else {
    pack(layouts_[1], both, PlainRows{up, both, inter});
  }

  bf16* down_a = dense(rank, inter);
  copy(kDownA, down_a, inter);
  pack(layouts_[2], inter, PlainRows{down_a, inter, rank});

  bf16* down_b = dense(hidden, rank);
  copy(kDownB, down_b, rank);
  pack(layouts_[3], rank, PlainRows{down_b, rank, hidden});
}

}  // namespace ktmoe
