// LoraAdapter: the packed bf16 mirror of one layer's LoRA matrices, in the same VK tiles as the weights, so that the same kernels run
// them in both directions.
//
//   a_gate_up  [2 rank] x hidden   columns 0 .. rank-1 = gate A, rank .. 2 rank-1 = up A:          [Ug | Uu] = X [Ag ; Au]^T
//   b_gate_up  paired, K = 2 rank  gate columns use k < rank, up columns k >= rank, else zero:     both corrections from [Ug | Uu]
//   without a gate: a_gate_up is rank x hidden, b_gate_up plain inter x rank
//   a_down     rank x inter
//   b_down     hidden x rank
// There is one mirror however many parts the layer has: a slice is a range of panels or of k-steps, and is used where it lies.
// scaling = alpha / rank (or the caller's rule) is applied to U and V in fp32, before they round to bf16.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/aligned_buffer.h"
#include "format/packed_matrix.h"
#include "kernels/kernel_api.h"
#include "moe/partition.h"
#include "runtime/sub_pools.h"

namespace ktmoe {

// A [experts, rows, columns] tensor of fp32 or bf16 with any strides (in elements); absent without data.
struct StridedTensor {
  const void* data;
  bool is_fp32;
  std::int64_t stride[3];

  StridedTensor from(std::int64_t e, std::int64_t i, std::int64_t j) const {
    const std::int64_t at = e * stride[0] + i * stride[1] + j * stride[2];
    return {static_cast<const std::byte*>(data) + at * (is_fp32 ? 4 : 2), is_fp32, {stride[0], stride[1], stride[2]}};
  }
  // n elements along one of its dimensions as bf16.
  void copy(const KernelTable& kernels, int dimension, int n, bf16* dst) const;
};

enum LoraTensor { kGateA, kGateB, kUpA, kUpB, kDownA, kDownB };

struct LoraExpert {
  PackedMatrix a_gate_up, b_gate_up, a_down, b_down;
};

class LoraAdapter {
 public:
  LoraAdapter(int n_experts, int hidden, int inter, int rank, float scaling, bool gated = true);
  // Not while a forward or backward uses the adapter: both hold a Session of the pools, and so does this.
  void update(SubPools& pools, const std::array<StridedTensor, 6>& tensors);

  const int n_experts, hidden, inter, rank;
  const float scaling;
  const bool gated;  // false: kGateA and kGateB do not exist
  std::uint64_t version() const { return version_; }
  bool has(LoraTensor t) const { return gated || t >= kUpA; }
  int gate_up_rank() const { return gated ? 2 * rank : rank; }  // columns of [Ug | Uu]
  // [rows, columns] of each of the six tensors, per expert.
  std::array<int, 2> shape(LoraTensor t) const;
  // What a part of the layer uses: its rows of b_gate_up, its columns of a_down, and all of the others, in place.
  LoraExpert expert(int e, const Slice& slice) const;

 private:
  class Packer;
  std::array<PackedLayout, 4> layouts_;
  std::size_t expert_bytes_ = 0;
  AlignedBuffer data_;
  std::uint64_t version_ = 0;
};

// Packs a bf16 matrix (rows of panel columns given by `row_of(panel, column)`, null = zero column) into `dst`; used for weights too.
template <class RowOf>
void pack_matrix(const KernelTable& kernels, const PackedLayout& layout, int p0, int p1, std::ptrdiff_t ld, RowOf row_of, std::byte* dst) {
  const FormatInfo& info = format_info(layout.format);
  for (int p = p0; p < p1; ++p)
    for (int t = 0; t < 2; ++t) {
      const auto [src, rows] = row_of(p, t);  // the tile's first row and how many of its 16 rows exist
      float scale[kTileColumns] = {};
      if (info.has_scales) {
        kernels.row_scales(layout.format, src, ld, rows, layout.k, scale);
        std::byte* scales = dst + layout.panel_stride * static_cast<std::size_t>(layout.n_panels);
        std::memcpy(scales + (static_cast<std::ptrdiff_t>(p) * kPanelColumns + t * kTileColumns) * 4, scale, sizeof scale);
      }
      for (int s = 0; s < layout.k_steps; ++s) {
        const int k0 = s * info.k_step, columns = std::min(info.k_step, layout.k - k0);
        kernels.pack_tile(
            layout.format, src + k0, ld, rows, columns, scale,
            dst + layout.panel_stride * static_cast<std::size_t>(p) + (2 * s + t) * static_cast<std::ptrdiff_t>(info.tile_bytes));
      }
    }
}

// The tiles of a plain N x K matrix at `src`.
struct PlainRows {
  const bf16* src;
  std::ptrdiff_t ld;
  int n;
  std::pair<const bf16*, int> operator()(int p, int t) const {
    const int first = p * kPanelColumns + t * kTileColumns, rows = std::clamp(n - first, 0, kTileColumns);
    return {src + (rows > 0 ? first * ld : 0), rows};
  }
};

// The tiles of a paired matrix: tile 0 from `gate`, tile 1 from `up`.
struct PairedRows {
  const bf16 *gate, *up;
  std::ptrdiff_t ld;
  int n;
  std::pair<const bf16*, int> operator()(int p, int t) const {
    const int first = p * kTileColumns;
    return {(t == 0 ? gate : up) + first * ld, std::min(n - first, kTileColumns)};
  }
};

}  // namespace ktmoe
