// GGUF blocks of 32 with one f16 scale d: Q4_0, IQ4_NL, Q8_0. Kept as they are, 16 columns interleaved.
//
//   Q4_0    w = d (q - 8),     q in 0..15;  byte j of the block: k = j (low nibble), k = j + 16 (high nibble)
//   IQ4_NL  w = d values[q],   same bytes
//   Q8_0    w = d q,           q signed
//   tile for two blocks: row 0 = 16 f16 of block 0 | 16 f16 of block 1; then nibbles (8 consecutive k in a word) or bytes (4)
#pragma once

#include "format/tile.h"

namespace ktmoe {

// Which levels a 4-bit code of IQ4_NL stands for.
inline constexpr std::int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

template <bool kNonlinear>
struct Gguf4Bit {
  static constexpr const char* name = kNonlinear ? "iq4_nl" : "q4_0";
  static constexpr int k_step = 64;
  static constexpr int rows = 1 + k_step / 8;
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr int scale_rows = 1, bits = 4, block = 32;
  static constexpr RawPart parts[] = {{32, 18}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    const int q = get_field<4>(tile, 1, column, k);
    const auto level = static_cast<float>(kNonlinear ? kIq4Values[q] : q - 8);
    return level * f16_to_float(load_as<std::uint16_t>(half_at(tile, 0, k / 32, column)));
  }
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) {
    if (!f16_finite(src.part[0])) return false;
    std::memcpy(half_at(tile, 0, b, column), src.part[0], 2);
    for (int j = 0; j < 16; ++j) {
      const int both = static_cast<int>(src.part[0][2 + j]);
      put_field<4>(tile, 1, column, 32 * b + j, both & 15);
      put_field<4>(tile, 1, column, 32 * b + 16 + j, both >> 4);
    }
    return true;
  }
};
using Q4_0Format = Gguf4Bit<false>;
using Iq4NlFormat = Gguf4Bit<true>;

struct Q8_0Format {
  static constexpr const char* name = "q8_0";
  static constexpr int k_step = 64;
  static constexpr int rows = 1 + k_step / 4;
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr int scale_rows = 1, bits = 8, block = 32;
  static constexpr RawPart parts[] = {{32, 34}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    return static_cast<float>(static_cast<std::int8_t>(get_field<8>(tile, 1, column, k))) *
           f16_to_float(load_as<std::uint16_t>(half_at(tile, 0, k / 32, column)));
  }
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) {
    if (!f16_finite(src.part[0])) return false;
    std::memcpy(half_at(tile, 0, b, column), src.part[0], 2);
    for (int i = 0; i < 8; ++i) std::memcpy(tile_word(tile, 1 + 8 * b + i, column), src.part[0] + 2 + 4 * i, 4);
    return true;
  }
};

}  // namespace ktmoe
