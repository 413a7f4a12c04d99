// What the parts of a published matrix are as arrays.
#pragma once

#include "bindings/tensor_arg.h"
#include "format/format.h"

namespace ktmoe {

// Part 0 holds codes, as bytes; the others scales (bf16 or fp32) or small integers.
inline Dtype raw_part_dtype(const FormatInfo& info, std::size_t part) {
  const int bytes = info.parts[part].bytes;
  return part == 0 || bytes == 1 ? Dtype::uint8 : bytes == 2 ? Dtype::bf16 : Dtype::fp32;
}

inline std::size_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::fp32 ? 4 : dtype == Dtype::bf16 ? 2 : 1;
}

}  // namespace ktmoe
