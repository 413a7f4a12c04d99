// int8 weights, symmetric, one fp32 scale per output column (row of W), in VK tiles of quads along K.
//
//   scale = max|w| / 127,  q = round-half-even(w / scale) in [-127, 127],  w ~ q * scale
//   A column with NaN or infinity has scale NaN. A column whose maximum is below 127 * 2^-126 is all zeros with scale 0 (its scale would be
//   subnormal). tile = 16 rows x 64 bytes; row j holds, for each of 16 output columns, the quad k = 4j .. 4j+3.
#pragma once

#include <cmath>

#include "base/bf16.h"

namespace ktmoe {

struct Int8Format {
  static constexpr const char* name = "int8";
  static constexpr int k_step = 64;
  static constexpr int per_word = 4;
  static constexpr bool has_scales = true;
  static constexpr float max_level = 127.0f;
  static constexpr float smallest_max = 127.0f * 1.17549435e-38f;

  static float scale(float max_abs) { return max_abs < smallest_max ? 0.0f : max_abs / max_level; }
  static std::int8_t quantize(float w, float scale) {
    return scale == 0.0f ? std::int8_t{0} : static_cast<std::int8_t>(std::nearbyint(w / scale));
  }
  static float dequantize(const std::byte* word, int i, float scale) {
    return static_cast<float>(static_cast<std::int8_t>(word[i])) * scale;
  }
};

}  // namespace ktmoe
