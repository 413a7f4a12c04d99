// A stored tile: 16 output columns x k_step consecutive k of one format, in rows of 64 bytes; word n of a row belongs to column n.
// The vocabulary of the format files, scalar and readable; the kernels read the same rows 16 columns at a time.
#pragma once

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
template <int bits>
void put_field(std::byte* tile, int row, int column, int k, int value) {
  std::byte* at = tile_word(tile, row + k * bits / 32, column);
  const int shift = field_shift<bits>(k);
  const std::uint32_t mask = static_cast<std::uint32_t>((std::uint64_t{1} << bits) - 1) << shift;
  const std::uint32_t word = (load_as<std::uint32_t>(at) & ~mask) | (static_cast<std::uint32_t>(value) << shift & mask);
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
inline bool f16_finite(const std::byte* p) {
  return (load_as<std::uint16_t>(p) & 0x7c00) != 0x7c00;
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

}  // namespace ktmoe
