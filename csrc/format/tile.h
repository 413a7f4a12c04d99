// A stored tile: 16 output columns x k_step consecutive k of one format, in rows of 64 bytes; word n of a row belongs to column n.
// The vocabulary of the format files, scalar and readable; the kernels read the same rows 16 columns at a time.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/bf16.h"

namespace ktmoe {

inline constexpr int kRowBytes = 64;

inline std::byte* tile_word(std::byte* tile, int row, int column) {
  return tile + kRowBytes * row + 4 * column;
}
inline const std::byte* tile_word(const std::byte* tile, int row, int column) {
  return tile + kRowBytes * row + 4 * column;
}

template <class T>
T load_as(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// A plane of b-bit fields from `row` on, 32 / b consecutive k in each word. Nibbles lie in order, the first in the lowest bits. Narrower
// fields, the high bits that belong to nibbles, lie beside them byte by byte: byte j of a word has those of byte j of each nibble word.
template <int bits>
constexpr int field_shift(int k) {
  if (bits >= 4) return k % (32 / bits) * bits;
  return 8 * (k % 8 / 2) + bits * (k % (32 / bits) / 8 * 2 + k % 2);
}
template <int bits>
int get_field(const std::byte* tile, int row, int column, int k) {
  const auto word = load_as<std::uint32_t>(tile_word(tile, row + k * bits / 32, column));
  return static_cast<int>(word >> field_shift<bits>(k) & ((std::uint64_t{1} << bits) - 1));
}
// 8 fields, one in the low bits of each byte, in the order in which a word has those of 8 consecutive k, from its lowest bit on.
template <int bits>
std::uint32_t squeeze(std::uint64_t bytes) {
  std::uint64_t x = bytes & 0x0101010101010101 * ((1u << bits) - 1);
  x = (x | x >> (8 - bits)) & 0x00ff00ff00ff00ff;
  x = (x | x >> 8) & 0x0000ffff0000ffff;
  return static_cast<std::uint32_t>(x | x >> 16);
}
// The fields of k .. k + 7, k a multiple of 8, into a plane that holds zeros.
template <int bits>
void put_fields(std::byte* tile, int row, int column, int k, std::uint64_t bytes) {
  std::byte* at = tile_word(tile, row + k * bits / 32, column);
  const std::uint32_t word = load_as<std::uint32_t>(at) | squeeze<bits>(bytes) << (k % (32 / bits) / 8 * 2 * bits);
  std::memcpy(at, &word, 4);
}

// A row of two times 16 half-width numbers (f16 or bf16): number `half` of column n.
inline std::byte* half_at(std::byte* tile, int row, int half, int column) {
  return tile + kRowBytes * row + 32 * half + 2 * column;
}
inline const std::byte* half_at(const std::byte* tile, int row, int half, int column) {
  return tile + kRowBytes * row + 32 * half + 2 * column;
}

// IEEE half precision. The formats refuse infinities and NaN, so only finite numbers come here.
inline float f16_to_float(std::uint16_t h) {
  const std::uint32_t bits = static_cast<std::uint32_t>(h & 0x7fff) << 13;
  const float magnitude = load_as<float>(&bits) * 0x1p112f;  // also right for subnormals
  return h & 0x8000 ? -magnitude : magnitude;
}
// Round to nearest even; infinite from 65520 on, NaN stays NaN.
inline std::uint16_t to_f16(float x) {
  const auto bits = load_as<std::uint32_t>(&x);
  const std::uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  const auto with_sign = [&](std::uint32_t half) { return static_cast<std::uint16_t>(sign | half); };
  if (size > 0x7f800000) return with_sign(0x7e00);
  if (size >= 0x477ff000) return with_sign(0x7c00);
  if (size >= 0x38800000) return with_sign((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
  const float aligned = load_as<float>(&size) + 0.5f;  // subnormal: the last place of 0.5 is theirs
  return with_sign(load_as<std::uint32_t>(&aligned) - 0x3f000000);
}
inline bool f16_finite(std::uint16_t h) {
  return (h & 0x7c00) != 0x7c00;
}
inline bool f16_finite(const std::byte* p) {
  return f16_finite(load_as<std::uint16_t>(p));
}
// NaN for those that are not finite.
inline float f16_or_nan(const std::byte* p) {
  return f16_finite(p) ? f16_to_float(load_as<std::uint16_t>(p)) : std::nanf("");
}

// What a published format consists of, per matrix row: `bytes` for every `block` consecutive k (ragged rows round up).
struct RawPart {
  int block;
  int bytes;
};
inline constexpr int kMostRawParts = 3;

// Where one block of a published row lies: a pointer into each part.
struct RawBlock {
  const std::byte* part[kMostRawParts];
};

// w = (q - zero) * scale of n nibbles, the even k of a byte in the low one.
inline void decode_nibbles(const std::byte* codes, int n, int zero, float scale, float* w) {
  for (int j = 0; j < n / 2; ++j) {
    const int both = static_cast<int>(codes[j]);
    w[2 * j] = static_cast<float>((both & 15) - zero) * scale;
    w[2 * j + 1] = static_cast<float>((both >> 4) - zero) * scale;
  }
}

}  // namespace ktmoe
