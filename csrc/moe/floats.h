// Matrices of floats -> published formats, as a file of that format would hold them, and back.
#pragma once

#include "kernels/kernel_api.h"
#include "runtime/sub_pools.h"

namespace ktmoe {

// [n, k] of bf16 or fp32, rows `ld` numbers apart.
template <class Data>
struct FloatMatrix {
  Data* data;
  bool is_bf16;
  std::ptrdiff_t ld;
  int n, k;
};

// pools: whose threads share the work; null: the caller's thread does it.

// Fills the parts that FormatInfo describes, rows dense, ragged rows padded with zeros to whole blocks; a format with `from_floats`.
void quantize_matrix(SubPools* pools, Isa isa, WeightFormat format, const FloatMatrix<const void>& src, std::byte* const* parts);

// The numbers that a published matrix stands for, bf16 rounded to nearest even. What is not finite comes out as such.
void dequantize_matrix(SubPools* pools, Isa isa, WeightFormat format, const RawBlock& src, const FloatMatrix<void>& dst);

}  // namespace ktmoe
