// The contract between the layer and the kernels of one ISA. Kernels are single-threaded; they neither allocate, lock, throw nor print.
//
// Vocabulary
//   row       one (token, expert) pair; m rows of one expert form a block, m <= block_rows
//   C block   fp32 [m][32] row-major for one panel (forward) or 32 input columns (backward); blocks of a call follow each other at
//             c_block_floats(m) floats; rows m .. round_up(m, 32) of a block are scratch of the kernel
//   operand   activations in the private order of one ISA, made by pack_*; 64-byte aligned
// No kernel reads or writes outside its operands: rows of RowSource beyond `columns`, for example, are never touched.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bf16.h"
#include "base/isa.h"
#include "format/packed_matrix.h"
#include "kernels/activation.h"

namespace ktmoe {

// m rows of bf16 (or int8, where said) at base + ld * (index ? index[i] : i); strides in elements.
struct RowSource {
  const void* base;
  std::ptrdiff_t ld;
  const std::int32_t* index;

  template <class T>
  const T* row(int i) const {
    return static_cast<const T*>(base) + ld * (index ? index[i] : i);
  }
};

constexpr std::size_t c_block_floats(int m) {
  return static_cast<std::size_t>(round_up(m, 32)) * kPanelColumns;
}

// Another product of the same rows, added to a forward product: operand W^T, W in bf16 with as many panels.
struct Addend {
  const std::byte* operand;
  const PackedMatrix& w;
};

// Takes the finished sums of a forward product while they are in a near cache: once for every row and panel of the call, in any order and
// in runs of any length. c: rows [row, row + rows) of the panel, row-major [rows][32], which it may change.
struct Epilogue {
  void (*take)(void* context, float* c, int row, int rows, int panel);
  void* context;
};

struct KernelTable {
  Isa isa;
  int block_rows;  // most rows of one block

  // --- packing weights ---
  // Formats that are packed straight from bf16: bf16, int8, int4. Published formats are repacked as they are: see FormatInfo.
  // scale[r] of each of `rows` (<= 16) source rows of `k` bf16 at stride ld; formats with scales only.
  void (*row_scales)(WeightFormat, const bf16* src, std::ptrdiff_t ld, int rows, int k, float* scale);
  // One stored tile from rows (<= 16) x columns (<= k_step), zero padded. scale: as row_scales made it, or null.
  void (*pack_tile)(WeightFormat, const bf16* src, std::ptrdiff_t ld, int rows, int columns, const float* scale, std::byte* dst);

  // Floats into published bytes, for formats with FormatInfo::from_floats: n blocks of w (FormatInfo::block floats each), which follow each
  // other in the parts, too. FP8: at most 128 blocks, which get one scale in common.
  void (*quantize_blocks)(WeightFormat, const float* w, int n, std::byte* const* parts);

  // --- forward: C = X W^T ---
  // int8 activations: one symmetric scale per row (as Int8Format), zero padded to ld columns. A row with NaN or Inf gets scale NaN.
  void (*quantize_rows)(RowSource bf16_rows, int m, int k, std::int8_t* dst, std::ptrdiff_t ld, float* scale);
  std::size_t (*operand_bytes)(WeightFormat, int m, int k);
  // Formats that multiply in bf16: rows are bf16 and row_scale is null. Those that multiply in int8: rows are int8 (readable to the padded
  // k) and row_scale[i] belongs to row i of the source (it goes through `index` too).
  void (*pack_operand)(WeightFormat, RowSource rows, const float* row_scale, int m, int k, std::byte* dst);
  // Panels [p0, p1) of w, and of what is added (or null). With an epilogue (or null) C ends up there, and what is left in c means nothing.
  void (*forward)(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, const Addend* plus,
                  const Epilogue* epilogue);

  // --- backward: C = dY W, from the same packed bytes ---
  // dY has one column per panel column of W, in panel order; column_scale (or null) multiplies each column: the weights' own scales.
  std::size_t (*grad_operand_bytes)(int m, int n_panels);
  // `columns` <= 32 * n_panels are read, the rest counts as zero.
  void (*pack_grad_operand)(RowSource dy, const float* column_scale, int m, int columns, int n_panels, std::byte* dst);
  // Stored k-steps [s0, s1) of w: k_step / 32 C blocks each, columns in natural order. The weights' scales are not applied here.
  void (*backward)(const std::byte* operand, int m, const PackedMatrix& w, int s0, int s1, float* c, bool accumulate);

  // --- gradients of small matrices: out[i][j] (+)= sum over rows of P[row][i] * Q[row][j] ---
  std::size_t (*outer_operand_bytes)(int m, int p_columns);
  void (*pack_outer_operand)(const bf16* p, std::ptrdiff_t ld, int m, int p_columns, std::byte* dst);
  // Q: n_tiles tiles of 16 columns, q_tile_stride columns apart (readable in full); out is fp32 with row stride ld_out, 16 columns a tile.
  void (*outer)(const std::byte* operand, int m, int p_columns, RowSource q, int q_tile_stride, int n_tiles, float* out,
                std::ptrdiff_t ld_out, bool accumulate);

  // --- elementwise ---
  // C block p gets bias[32p + i] added to column i of its m rows.
  void (*add_bias)(float* c, int m, int n_blocks, const float* bias);
  // h of C blocks of gate/up, bf16: h_per_panel() columns a block. gate_up (or null) receives gate and up as bf16 in panel
  // order, those that the clamp holds moved beyond the limit.
  void (*activate)(const Activation&, const float* c, int m, int n_panels, bf16* h, std::ptrdiff_t ld_h, bf16* gate_up,
                   std::ptrdiff_t ld_gate_up);
  // Backward of activate for n_panels panels, given dH~ (gradient of h before the routing weight) in C blocks of 32 columns of h:
  // dot[row] += <h, dH~>; dgate_up = weight[row] * gradients (panel order); h is recomputed.
  void (*activate_backward)(const Activation&, const float* dh, int m, int n_panels, const bf16* gate_up, std::ptrdiff_t ld_gate_up,
                            const float* weight, bf16* dgate_up, std::ptrdiff_t ld_dgate_up, bf16* h, std::ptrdiff_t ld_h, float* dot);
  // dot[i] += <row i, v> of bf16 rows; v is readable to a multiple of 16.
  void (*dot_rows)(RowSource rows, int m, const float* v, int n, float* dot);
  // dst[row][j] = bf16(factor * row_factor[row] * C), j < 32 * n_blocks; row_factor may be null.
  void (*c_to_bf16)(const float* c, int m, int n_blocks, float factor, const float* row_factor, bf16* dst, std::ptrdiff_t ld);
  // dst[row][j] = C, j < 32 * n_blocks.
  void (*c_to_rows)(const float* c, int m, int n_blocks, float* dst, std::ptrdiff_t ld);
  // The same as bf16 in whole cache lines that pass by the caches: dst and ld are multiples of 32. Other threads see them after a fence.
  void (*stream_rows)(const float* c, int m, int n_blocks, bf16* dst, std::ptrdiff_t ld);
  // sum[j] over slots with row_of[slot] >= 0, in slot order, of weight[slot] * rows[row_of[slot]][j]; n is a multiple of 32;
  // weight null means 1.
  void (*combine)(const float* rows, std::ptrdiff_t ld, const std::int32_t* row_of, const float* weight, int top_k, int n, float* sum);
  void (*combine_bf16)(const bf16* rows, std::ptrdiff_t ld, const std::int32_t* row_of, const float* weight, int top_k, int n, float* sum);
  void (*round_row)(const float* src, int n, bf16* dst);
};

const KernelTable& kernels_for(Isa isa);

}  // namespace ktmoe
