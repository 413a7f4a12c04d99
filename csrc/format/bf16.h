// bf16 weights: stored as they are, in VK tiles of pairs along K.
//
//   tile = 16 rows x 64 bytes; row j holds, for each of 16 output columns, the pair k = 2j, 2j+1:
//          [ W[n0][2j] W[n0][2j+1] | W[n0+1][2j] W[n0+1][2j+1] | ... | W[n0+15][2j] W[n0+15][2j+1] ]
#pragma once

#include "format/tile.h"

namespace ktmoe {

struct Bf16Format {
  static constexpr const char* name = "bf16";
  static constexpr int k_step = 32;  // weights of one column in one tile
  static constexpr int rows = 16;    // of 64 bytes
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    return to_float(load_as<bf16>(tile_word(tile, k / 2, column) + 2 * (k % 2)));
  }
};

}  // namespace ktmoe
