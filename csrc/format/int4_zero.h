// Published int4 with one bf16 scale and one zero point per group of 32, 64 or 128 consecutive k ("pack-quantized", asymmetric), kept as
// it is.
//
//   w = (q - z) * scale,  q and z in 0..15
//   source: per row k/2 bytes, low nibble = even k; one bf16 scale per group; one byte z per group
//   tile: 16 scales of group 0 | 16 scales of group 1 a row; a row of z, byte j of a word for group j; then nibbles, 8 consecutive k in a
//   word. Four groups of 32 share the row of z; of larger groups two do, lest a tile be longer than 256 k.
#pragma once

#include "format/tile.h"

namespace ktmoe {

template <int G>
struct Int4Zero {
  static constexpr const char* name = G == 32 ? "int4_g32z" : G == 64 ? "int4_g64z" : "int4_g128z";
  static constexpr bool from_floats = true;
  static constexpr int groups = G == 32 ? 4 : 2;
  static constexpr int k_step = groups * G;
  static constexpr int zero_row = groups / 2;
  static constexpr int scale_rows = zero_row + 1, bits = 4, block = G;
  static constexpr int rows = scale_rows + k_step / 8;
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr RawPart parts[] = {{G, G / 2}, {G, 2}, {G, 1}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    const int group = k / G, q = get_field<4>(tile, scale_rows, column, k);
    return static_cast<float>(q - static_cast<int>(tile_word(tile, zero_row, column)[group])) *
           to_float(load_as<bf16>(half_at(tile, 0, group, column)));
  }
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    decode_nibbles(src.part[0], G, static_cast<int>(src.part[2][0]), to_float(load_as<bf16>(src.part[1])), w);
  }
  // Zero points of 16 and more are refused like scales that are not finite.
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) {
    if ((load_as<std::uint16_t>(src.part[1]) & 0x7f80) == 0x7f80 || src.part[2][0] > std::byte{15}) return false;
    for (int i = 0; i < G / 8; ++i) std::memcpy(tile_word(tile, scale_rows + b * G / 8 + i, column), src.part[0] + 4 * i, 4);
    std::memcpy(half_at(tile, 0, b, column), src.part[1], 2);
    tile_word(tile, zero_row, column)[b] = src.part[2][0];
    return true;
  }
};
using Int4Zero32 = Int4Zero<32>;
using Int4Zero64 = Int4Zero<64>;
using Int4Zero128 = Int4Zero<128>;

}  // namespace ktmoe
