// Gradients of the base weights of one expert, in bands of 64 rows of a weight matrix: dW[i][j] = sum over tokens of P[row][i] Q[row][j].
//
//   gate, up: P = dG|dU (panel order), Q = x        down: P = w dY, Q = h
// A band is summed in fp32 over all blocks of the expert and then written once.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/kernel_api.h"
#include "moe/part.h"
#include "runtime/scratch.h"

namespace ktmoe {

constexpr int kBandRows = 64;

// One block of rows of the expert, as both factors see it.
struct BandBlock {
  int m;
  RowSource p;
  const float* p_weight;  // multiplies the rows of P, or null
  RowSource q;
};

class Band {
 public:
  // most: rows of the largest block. q_columns: of Q and of the weight matrix.
  Band(const KernelTable& kernels, Scratch& scratch, int most, int q_columns)
      : k_(kernels), columns_(q_columns), ld_(round_up(q_columns, kTileColumns)) {
    const std::size_t m = static_cast<std::size_t>(most);
    p_ = scratch.take<bf16>(m * kBandRows);
    operand_ = scratch.take<std::byte>(k_.outer_operand_bytes(most, kBandRows));
    sum_ = scratch.take<float>(static_cast<std::size_t>(kBandRows) * static_cast<std::size_t>(ld_));
    if (ld_ != columns_) padded_ = scratch.take<bf16>(m * static_cast<std::size_t>(ld_));
  }

  // Columns [first, first + count) of P; first: the block is the first one of the expert.
  void add(const BandBlock& block, int first_column, int count, bool first) {
    for (int r = 0; r < block.m; ++r) {
      const bf16* src = block.p.row<bf16>(r) + first_column;
      bf16* dst = p_ + static_cast<std::ptrdiff_t>(r) * kBandRows;
      for (int j = 0; j < count; ++j) dst[j] = block.p_weight ? to_bf16(block.p_weight[r] * to_float(src[j])) : src[j];
    }
    k_.pack_outer_operand(p_, kBandRows, block.m, count, operand_);
    k_.outer(operand_, block.m, count, whole_tiles(block), kTileColumns, static_cast<int>(ld_) / kTileColumns, sum_, ld_, !first);
  }

  // Row i of the band is written to dst, or added to what is there.
  void write(int i, FloatOrBf16 dst, bool accumulate) const {
    const float* src = sum_ + i * ld_;
    for (int j = 0; dst.f32 && j < columns_; ++j) dst.f32[j] = accumulate ? dst.f32[j] + src[j] : src[j];
    for (int j = 0; dst.b16 && j < columns_; ++j) dst.b16[j] = to_bf16(accumulate ? to_float(dst.b16[j]) + src[j] : src[j]);
  }

 private:
  // Rows that may be read to the end of their last tile.
  RowSource whole_tiles(const BandBlock& block) {
    if (!padded_) return block.q;
    for (int r = 0; r < block.m; ++r) {
      bf16* row = padded_ + r * ld_;
      std::memcpy(row, block.q.row<bf16>(r), sizeof(bf16) * static_cast<std::size_t>(columns_));
      std::fill(row + columns_, row + ld_, bf16{});
    }
    return {padded_, ld_, nullptr};
  }

  const KernelTable& k_;
  const int columns_;
  const std::ptrdiff_t ld_;
  bf16 *p_, *padded_ = nullptr;
  std::byte* operand_;
  float* sum_;
};

}  // namespace ktmoe
