// bf16 weights: stored as they are, in VK tiles of pairs along K.
//
//   tile = 16 rows x 64 bytes; row j holds, for each of 16 output columns, the pair k = 2j, 2j+1:
//          [ W[n0][2j] W[n0][2j+1] | W[n0+1][2j] W[n0+1][2j+1] | ... | W[n0+15][2j] W[n0+15][2j+1] ]
#pragma once

#include "base/bf16.h"

namespace ktmoe {

struct Bf16Format {
  static constexpr const char* name = "bf16";
  static constexpr int k_step = 32;   // weights of one column in one tile
  static constexpr int per_word = 2;  // consecutive k in one 32-bit word
  static constexpr bool has_scales = false;

  static float dequantize(const std::byte* word, int i, float /*scale*/) {
    bf16 w;
    std::memcpy(&w, word + 2 * i, 2);
    return to_float(w);
  }
};

}  // namespace ktmoe
