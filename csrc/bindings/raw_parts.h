// What the parts of a published matrix are as arrays.
#pragma once

#include <array>

#include "bindings/tensor_arg.h"
#include "moe/raw_matrix.h"

namespace ktmoe {

// Part 0 holds codes, as bytes; the others scales (bf16 or fp32) or small integers.
inline Dtype raw_part_dtype(const FormatInfo& info, std::size_t part) {
  const int bytes = info.parts[part].bytes;
  return part == 0 || bytes == 1 ? Dtype::uint8 : bytes == 2 ? Dtype::bf16 : Dtype::fp32;
}

inline std::size_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::fp32 ? 4 : dtype == Dtype::bf16 ? 2 : 1;
}

// The parts of a matrix [n, k], checked; null where there are fewer.
template <class Byte, class Array>
std::array<Byte*, kMostRawParts> raw_parts(const char* function, const char* name, const std::vector<Array>& arrays, const FormatInfo& info,
                                           int n, int k) {
  const auto expected = static_cast<std::size_t>(info.n_parts());
  require(arrays.size() == expected, ErrorKind::value, "[", function, "] ", name, ": got ", arrays.size(), " arrays, expected ", expected,
          " for format ", info.name);
  std::array<Byte*, kMostRawParts> parts{};
  for (std::size_t i = 0; i < expected; ++i) {
    const Dtype dtype = raw_part_dtype(info, i);
    TensorArg<Array> part(function, name, arrays[i]);
    part.dtype({dtype}).shape({n, static_cast<std::int64_t>(raw_row_bytes(info.parts[i], k) / dtype_bytes(dtype))}).contiguous();
    parts[i] = part.template data<std::byte>();
  }
  return parts;
}

}  // namespace ktmoe
