// Published FP8 (e4m3fn) with fp32 scales, kept as it is. One scale per output column and 128 consecutive k covers blocks of 128 x 128
// as well as scales per channel.
//
//   w = e4m3(code) * scale
//   source: per row k bytes; and one fp32 scale per 128 k. NaN codes (0x7f, 0xff) are refused.
//   tile for 128 k: row 0 = 16 scales, times 2^120; then codes, 4 consecutive k in a word.
//   A code moved to the top of a float (sign, 4 exponent bits, 3 mantissa bits) is e4m3(code) * 2^-120, subnormals included: hence 2^120.
#pragma once

#include "format/tile.h"

namespace ktmoe {

struct Fp8Format {
  static constexpr const char* name = "fp8";
  static constexpr bool from_floats = true;
  static constexpr int k_step = 128;
  static constexpr int rows = 1 + k_step / 4;
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr int scale_rows = 1, bits = 8, block = 128;
  static constexpr RawPart parts[] = {{1, 1}, {128, 4}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    const int code = get_field<8>(tile, 1, column, k);
    const std::uint32_t bits = static_cast<std::uint32_t>(code & 0x80) << 24 | static_cast<std::uint32_t>(code & 0x7f) << 20;
    return load_as<float>(&bits) * load_as<float>(tile_word(tile, 0, column));
  }
  static void decode(const RawBlock& src, int columns, float* w) {
    const float scale = load_as<float>(src.part[1]);
    const std::byte* codes = src.part[0];
    for (int k = 0; k < columns; ++k) {
      const auto code = static_cast<std::uint32_t>(codes[k]);
      const std::uint32_t size = code & 0x7f, bits = (code & 0x80) << 24 | (size == 0x7f ? 0x7fc00000 : size << 20);
      w[k] = std::bit_cast<float>(bits) * 0x1p120f * scale;
    }
  }
  static bool repack(const RawBlock& src, int column, int /*b*/, int columns, std::byte* tile) {
    const float scale = load_as<float>(src.part[1]) * 0x1p120f;
    if (!std::isfinite(scale)) return false;
    std::memcpy(tile_word(tile, 0, column), &scale, 4);
    std::uint32_t words[k_step / 4] = {}, nan = 0;
    std::memcpy(words, src.part[0], static_cast<std::size_t>(columns));
    for (int i = 0; i < k_step / 4; ++i) {
      nan |= ((words[i] & 0x7f7f7f7f) + 0x01010101) & 0x80808080;
      std::memcpy(tile_word(tile, 1 + i, column), &words[i], 4);
    }
    return nan == 0;
  }
};

}  // namespace ktmoe
