// int4 weights that are exact int8 numbers once unpacked, so that they run on int8 tiles with one fp32 scale per output column.
//
//   w ~ scale * (m q - o)      scale = max|w| / 127 of the column, as int8; q in 0..15
//   per block of 16 consecutive k: m in 1..16 (4 bits) and a zero point code z in 0..15 (4 bits), o = floor((15 + z) m / 3)
//   so the zero point o / m lies between 5 and 10, in thirds. 4 + 8 / 16 = 4.5 bits per weight.
//
// Choosing (m, z, q): by least squared error over m = m0 - 1 .. m0 + 3 and z = z0 - 2 .. z0 + 2, in this order, the first of equals;
// m0 = the least m whose steps reach all of the block, ceil(max((max - min) / 15, max / 10, -min / 10)) in units of scale, z0 the code
// that centres the block's range. On Gaussian and Student-t weights this finds what a search over all 256 pairs finds within 0.3 % (rms
// error 0.062 and 0.077). Errors are compared in fixed point, a step of m being 512. q is limited so that m q - o stays within -127 .. 127.
//
// tile = 9 rows x 64 bytes for k_step 64. Row 0: byte b of word n = code of block b of column n, m - 1 | z << 4. Rows 1..8: nibbles in
// the order of int8 quads: for block pair b (0, 1) and quad r (0..3), row 1 + 4b + r holds in byte j of word n
//   low nibble: k = 32b + 4r + j,   high nibble: k = 32b + 16 + 4r + j
#pragma once

#include "format/tile.h"

namespace ktmoe {

struct Int4Format {
  static constexpr const char* name = "int4";
  static constexpr int k_step = 64;
  static constexpr int rows = 9;
  static constexpr bool int8_products = true;
  static constexpr bool has_scales = true;
  static constexpr int block = 16;

  static constexpr int offset(int m, int code) { return (15 + code) * m / 3; }
  static int level(const std::byte* tile, int column, int k) {
    const auto code = static_cast<int>(tile_word(tile, 0, column)[k / block]);
    const int m = (code & 15) + 1, high = k / block % 2;
    const auto nibbles = static_cast<int>(tile_word(tile, 1 + 4 * (k / 32) + k % 16 / 4, column)[k % 4]);
    return m * (nibbles >> 4 * high & 15) - offset(m, code >> 4);
  }
  static float dequantize(const std::byte* tile, int column, int k, float scale) {
    return static_cast<float>(level(tile, column, k)) * scale;
  }
};

}  // namespace ktmoe
