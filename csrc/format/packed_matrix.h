// PackedMatrix: an immutable N x K weight matrix in tiles, the one copy that every kernel reads.
//
//   panel p (32 output columns x full K, contiguous):   k-step 0: [tile a][tile b]  k-step 1: [tile a][tile b] ...
//   plain  matrix: tile a = columns 32p .. 32p+15,      tile b = columns 32p+16 .. 32p+31
//   paired matrix: tile a = gate columns 16p .. 16p+15, tile b = up columns 16p .. 16p+15   (SwiGLU then is local to a panel)
//   after the panels: one fp32 scale per panel column (formats with scales)
// A stored tile holds what its format says; the direct ones (bf16, int8) are 1 KB VK tiles.
// N and K are padded with zero bytes to whole panels and k-steps, so that kernels know no tails: what a padded weight is worth does not
// matter, since activations are padded with zeros, and padded columns are not read.
#pragma once

#include <cstddef>

#include "base/checked.h"
#include "format/format.h"

namespace ktmoe {

inline constexpr int kLayoutVersion = 1;  // of packed bytes on disk: any change of what this folder says raises it
inline constexpr int kTileBytes = 1024;   // of a direct tile
inline constexpr int kPanelColumns = 32;
inline constexpr int kTileColumns = 16;

struct PackedLayout {
  WeightFormat format;
  int n_panels;
  int k;        // columns of the source
  int k_steps;  // ceil(k / k_step)
  std::size_t panel_stride;
  std::size_t bytes;

  static PackedLayout make(WeightFormat format, int n_panels, int k) {
    const FormatInfo& info = format_info(format);
    PackedLayout l{format, n_panels, k, ceil_div(k, info.k_step), 0, 0};
    l.panel_stride = checked_mul(static_cast<std::size_t>(l.k_steps), 2 * static_cast<std::size_t>(info.tile_bytes));
    // Backward walks across panels: a stride that is a multiple of 32 KB would map every panel to the same few sets of the L2.
    if (l.panel_stride % (32 * 1024) == 0) l.panel_stride += 2 * kTileBytes;
    l.bytes = checked_mul(l.panel_stride, static_cast<std::size_t>(n_panels));
    if (info.has_scales) l.bytes = checked_add(l.bytes, checked_mul(static_cast<std::size_t>(n_panels), kPanelColumns * 4));
    return l;
  }
  static PackedLayout plain(WeightFormat format, int n, int k) { return make(format, ceil_div(n, kPanelColumns), k); }
  static PackedLayout paired(WeightFormat format, int n, int k) { return make(format, ceil_div(n, kTileColumns), k); }

  int k_padded() const { return k_steps * format_info(format).k_step; }
  WeightFormat direct() const { return format_info(format).direct; }
};

class PackedMatrix {
 public:
  PackedMatrix() = default;
  PackedMatrix(PackedLayout layout, const std::byte* data) : layout_(layout), data_(data) {}

  const PackedLayout& layout() const { return layout_; }
  const std::byte* data() const { return data_; }
  const std::byte* panel(int p) const { return data_ + layout_.panel_stride * static_cast<std::size_t>(p); }
  const std::byte* tile(int p, int t, int step) const {
    return panel(p) + static_cast<std::ptrdiff_t>(format_info(layout_.format).tile_bytes) * (2 * step + t);
  }
  const float* scales() const { return reinterpret_cast<const float*>(panel(layout_.n_panels)); }

  // The weight of panel column c (0..31) at k: what the kernels use, but for a rounding to bf16 where block formats become bf16 tiles.
  // Slow and readable: the truth for tests and export.
  float weight(int p, int c, int k) const {
    const FormatInfo& info = format_info(layout_.format);
    return info.dequantize(tile(p, c / kTileColumns, k / info.k_step), c % kTileColumns, k % info.k_step,
                           info.has_scales ? scales()[p * kPanelColumns + c] : 1.0f);
  }

 private:
  PackedLayout layout_{};
  const std::byte* data_ = nullptr;
};

}  // namespace ktmoe
