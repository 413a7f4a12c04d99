// Where the blocks of a matrix in a published format lie.
#pragma once

#include "format/packed_matrix.h"

namespace ktmoe {

// Bytes of one row of one part for k weights.
inline std::size_t raw_row_bytes(const RawPart& part, int k) {
  return part.block == 0 ? 0 : static_cast<std::size_t>(ceil_div(k, part.block)) * static_cast<std::size_t>(part.bytes);
}

// The strides of rows and blocks in each part of a matrix with k columns.
class RawStrides {
 public:
  RawStrides(const FormatInfo& info, int k) : n_parts_(info.n_parts()) {
    for (int i = 0; i < n_parts_; ++i) {
      row_[i] = static_cast<std::ptrdiff_t>(raw_row_bytes(info.parts[i], k));
      block_[i] = info.block / info.parts[i].block * info.parts[i].bytes;
    }
  }
  // Of block b of a row, in bytes from the beginning of the part.
  std::ptrdiff_t offset(int part, int row, int b) const { return row_[part] * row + block_[part] * b; }
  RawBlock at(const RawBlock& matrix, int row, int b) const {
    RawBlock block{};
    for (int i = 0; i < n_parts_; ++i) block.part[i] = matrix.part[i] + offset(i, row, b);
    return block;
  }

 private:
  int n_parts_;
  std::ptrdiff_t row_[kMostRawParts] = {}, block_[kMostRawParts] = {};
};

}  // namespace ktmoe
