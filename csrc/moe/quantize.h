// Matrices of floats -> published formats: what a file of that format would hold.
#pragma once

#include "kernels/kernel_api.h"
#include "runtime/sub_pools.h"

namespace ktmoe {

// [n, k] with rows `ld` numbers apart.
struct FloatMatrix {
  const void* data;
  bool is_bf16;  // else fp32
  std::ptrdiff_t ld;
  int n, k;
};

// Fills the parts that FormatInfo describes, rows dense, ragged rows padded with zeros to whole blocks; a format with `from_floats`.
// pools: whose threads share the work; null: the caller's thread does it.
void quantize_matrix(SubPools* pools, Isa isa, WeightFormat format, const FloatMatrix& src, std::byte* const* parts);

}  // namespace ktmoe
