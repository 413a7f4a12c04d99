// PackedMatrix: an immutable N x K weight matrix in VK tiles, the one copy that every kernel reads.
//
//   panel p (32 output columns x full K, contiguous):   k-step 0: [tile a 1 KB][tile b 1 KB]  k-step 1: [tile a][tile b] ...
//   plain  matrix: tile a = columns 32p .. 32p+15,      tile b = columns 32p+16 .. 32p+31
//   paired matrix: tile a = gate columns 16p .. 16p+15, tile b = up columns 16p .. 16p+15   (SwiGLU then is local to a panel)
//   after the panels: one fp32 scale per panel column (formats with scales)
// N and K are padded with zero weights to whole panels and k-steps, so that kernels know no tails.
#pragma once

#include <cstddef>

#include "base/checked.h"
#include "format/format.h"

namespace ktmoe {

inline constexpr int kLayoutVersion = 1;  // of packed bytes on disk: any change of what this folder says raises it
inline constexpr int kTileBytes = 1024;
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
    l.panel_stride = checked_mul(static_cast<std::size_t>(l.k_steps), 2 * kTileBytes);
    // Backward walks across panels: a stride that is a multiple of 32 KB would map every panel to the same few sets of the L2.
    if (l.panel_stride % (32 * 1024) == 0) l.panel_stride += 2 * kTileBytes;
    l.bytes = checked_mul(l.panel_stride, static_cast<std::size_t>(n_panels));
    if (info.has_scales) l.bytes = checked_add(l.bytes, checked_mul(static_cast<std::size_t>(n_panels), kPanelColumns * 4));
    return l;
  }
  static PackedLayout plain(WeightFormat format, int n, int k) { return make(format, ceil_div(n, kPanelColumns), k); }
  static PackedLayout paired(WeightFormat format, int n, int k) { return make(format, ceil_div(n, kTileColumns), k); }

  int k_padded() const { return k_steps * format_info(format).k_step; }
};

class PackedMatrix {
 public:
  PackedMatrix() = default;
  PackedMatrix(PackedLayout layout, const std::byte* data) : layout_(layout), data_(data) {}

  const PackedLayout& layout() const { return layout_; }
  const std::byte* data() const { return data_; }
  const std::byte* panel(int p) const { return data_ + layout_.panel_stride * static_cast<std::size_t>(p); }
  const float* scales() const { return reinterpret_cast<const float*>(panel(layout_.n_panels)); }

  // The weight that the kernels use for panel column c (0..31) at k. Slow and readable: the truth for tests and export.
  float weight(int p, int c, int k) const {
    const FormatInfo& info = format_info(layout_.format);
    const std::byte* tile = panel(p) + 2 * kTileBytes * (k / info.k_step) + kTileBytes * (c / kTileColumns);
    const std::byte* word = tile + 64 * (k % info.k_step / info.per_word) + 4 * (c % kTileColumns);
    return info.dequantize(word, k % info.per_word, info.has_scales ? scales()[p * kPanelColumns + c] : 1.0f);
  }

 private:
  PackedLayout layout_{};
  const std::byte* data_ = nullptr;
};

}  // namespace ktmoe
