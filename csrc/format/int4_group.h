// Published int4 with one bf16 scale per group of 32, 64 or 128 consecutive k ("pack-quantized", symmetric), kept as it is.
//
//   w = (q - 8) * scale,  q in 0..15
//   source: per row k/2 bytes, low nibble = even k; and one bf16 scale per group
//   tile for two groups: row 0 = 16 scales of group 0 | 16 scales of group 1; then nibbles, 8 consecutive k in a word
#pragma once

#include "format/tile.h"

namespace ktmoe {

template <int G>
struct Int4Group {
  static constexpr const char* name = G == 32 ? "int4_g32" : G == 64 ? "int4_g64" : "int4_g128";
  static constexpr bool from_floats = true;
  static constexpr int k_step = 2 * G;
  static constexpr int rows = 1 + k_step / 8;
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr int scale_rows = 1, bits = 4, block = G;
  static constexpr std::int8_t zero = 8;
  static constexpr RawPart parts[] = {{G, G / 2}, {G, 2}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    return static_cast<float>(get_field<4>(tile, 1, column, k) - zero) * to_float(load_as<bf16>(half_at(tile, 0, k / G, column)));
  }
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    decode_nibbles(src.part[0], G, zero, to_float(load_as<bf16>(src.part[1])), w);
  }
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) {
    if ((load_as<std::uint16_t>(src.part[1]) & 0x7f80) == 0x7f80) return false;
    for (int i = 0; i < G / 8; ++i) std::memcpy(tile_word(tile, 1 + b * G / 8 + i, column), src.part[0] + 4 * i, 4);
    std::memcpy(half_at(tile, 0, b, column), src.part[1], 2);
    return true;
  }
};
using Int4Group32 = Int4Group<32>;
using Int4Group64 = Int4Group<64>;
using Int4Group128 = Int4Group<128>;

}  // namespace ktmoe
