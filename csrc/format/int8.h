// int8 weights, symmetric, one fp32 scale per output column (row of W), in VK tiles of quads along K.
//
//   scale = max|w| / 127,  q = round-half-even(w / scale) in [-127, 127],  w ~ q * scale
//   A column with NaN or infinity has scale NaN. A column whose maximum is below 127 * 2^-126 is all zeros with scale 0 (its scale would be
//   subnormal). tile = 16 rows x 64 bytes; row j holds, for each of 16 output columns, the quad k = 4j .. 4j+3.
#pragma once

#include "format/tile.h"

namespace ktmoe {

struct Int8Format {
  static constexpr const char* name = "int8";
  static constexpr int k_step = 64;
  static constexpr int rows = 16;
  static constexpr bool int8_products = true;
  static constexpr bool has_scales = true;
  static constexpr float max_level = 127.0f;
  static constexpr float smallest_max = 127.0f * 1.17549435e-38f;

  static float scale(float max_abs) { return max_abs < smallest_max ? 0.0f : max_abs / max_level; }
  static float dequantize(const std::byte* tile, int column, int k, float scale) {
    return static_cast<float>(load_as<std::int8_t>(tile_word(tile, k / 4, column) + k % 4)) * scale;
  }
};

}  // namespace ktmoe
