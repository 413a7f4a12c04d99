// GGUF super-blocks of 256: Q4_K, Q5_K, Q6_K. Kept as they are, but for the 6-bit scales, which get a byte each.
//
//   Q4_K, Q5_K   w = (d sc) q - (dmin mn)   d, dmin f16; sc, mn 0..63 for each 32 k; q of 4 or 5 bits
//   Q6_K         w = (d sc) (q - 32)        d f16; sc int8 for each 16 k; q of 6 bits
//   tile of Q4_K, Q5_K: row 0 = 16 d | 16 dmin; row 1 + g/2, word n = bytes sc, mn of group g (even), sc, mn of group g + 1
//   tile of Q6_K:       row 0 = 16 d | unused;  row 1 + g/4, byte g%4 of word n = sc of group g
//   then 32 rows of low nibbles (8 consecutive k in a word), then the high bits: 8 rows of 1 bit (Q5_K) or 16 rows of 2 bits (Q6_K)
#pragma once

#include "format/tile.h"

namespace ktmoe {

template <int kBits>
struct GgufK45 {
  static constexpr const char* name = kBits == 4 ? "q4_k" : "q5_k";
  static constexpr bool from_floats = kBits == 4;
  static constexpr int k_step = 256;
  static constexpr int scale_rows = 5, bits = kBits, block = 256;
  static constexpr int high_row = scale_rows + 32;
  static constexpr int rows = high_row + (kBits == 5 ? 8 : 0);
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr RawPart parts[] = {{256, kBits == 4 ? 144 : 176}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    const int g = k / 32;
    const std::byte* small = tile_word(tile, 1 + g / 2, column) + 2 * (g % 2);
    const float scale = f16_to_float(load_as<std::uint16_t>(half_at(tile, 0, 0, column))) * static_cast<float>(small[0]);
    const float shift = f16_to_float(load_as<std::uint16_t>(half_at(tile, 0, 1, column))) * static_cast<float>(small[1]);
    int q = get_field<4>(tile, scale_rows, column, k);
    if constexpr (kBits == 5) q |= get_field<1>(tile, high_row, column, k) << 4;
    return scale * static_cast<float>(q) - shift;
  }

  // source: d, dmin, 12 bytes of 6-bit scales, [Q5_K: 32 bytes of high bits,] 128 bytes of low nibbles
  static constexpr int high_at = 16, low_at = kBits == 4 ? 16 : 48;

  // sc and mn of group g. The first four of each are whole, the others lie in the spare bits.
  static void unpack_scales(const std::byte* block, int g, std::byte* to) {
    const std::byte *small = block + 4, six{63};
    to[0] = g < 4 ? small[g] & six : (small[g + 4] & std::byte{15}) | (small[g - 4] >> 6 << 4);
    to[1] = g < 4 ? small[g + 4] & six : (small[g + 4] >> 4) | (small[g] >> 6 << 4);
  }
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    const std::byte* p = src.part[0];
    for (int g = 0; g < 8; ++g, w += 32) {
      std::byte small[2];
      unpack_scales(p, g, small);
      const float scale = f16_or_nan(p) * static_cast<float>(small[0]), shift = f16_or_nan(p + 2) * static_cast<float>(small[1]);
      const std::byte* low = p + low_at + 32 * (g / 2);
      for (int j = 0; j < 32; ++j) {
        int q = static_cast<int>(low[j]) >> (g % 2 * 4) & 15;
        if constexpr (kBits == 5) q |= (static_cast<int>(p[high_at + j]) >> g & 1) << 4;
        w[j] = scale * static_cast<float>(q) - shift;
      }
    }
  }

  static bool repack(const RawBlock& src, int column, int /*b*/, int /*columns*/, std::byte* tile) {
    const std::byte* p = src.part[0];
    if (!f16_finite(p) || !f16_finite(p + 2)) return false;
    std::memcpy(half_at(tile, 0, 0, column), p, 2);
    std::memcpy(half_at(tile, 0, 1, column), p + 2, 2);
    const std::byte *high = p + high_at, *low = p + low_at;
    for (int g = 0; g < 8; ++g) unpack_scales(p, g, tile_word(tile, 1 + g / 2, column) + 2 * (g % 2));
    for (int k = 0; k < 256; k += 8) {  // 64 consecutive k share 32 bytes: low nibbles first, then high ones
      put_fields<4>(tile, scale_rows, column, k, load_as<std::uint64_t>(low + 32 * (k / 64) + k % 32) >> (k % 64 / 32 * 4));
      if constexpr (kBits == 5) put_fields<1>(tile, high_row, column, k, load_as<std::uint64_t>(high + k % 32) >> (k / 32));
    }
    return true;
  }
};
using Q4KFormat = GgufK45<4>;
using Q5KFormat = GgufK45<5>;

struct Q6KFormat {
  static constexpr const char* name = "q6_k";
  static constexpr bool from_floats = false;
  static constexpr int k_step = 256;
  static constexpr int scale_rows = 5, bits = 6, block = 256;
  static constexpr std::int8_t zero = 32;
  static constexpr int high_row = scale_rows + 32;
  static constexpr int rows = high_row + 16;
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr RawPart parts[] = {{256, 210}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    const int g = k / 16;
    const auto small = static_cast<std::int8_t>(tile_word(tile, 1 + g / 4, column)[g % 4]);
    const float scale = f16_to_float(load_as<std::uint16_t>(half_at(tile, 0, 0, column))) * static_cast<float>(small);
    const int q = get_field<4>(tile, scale_rows, column, k) | get_field<2>(tile, high_row, column, k) << 4;
    return scale * static_cast<float>(q - zero);
  }

  // source: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 int8 scales, d
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    const std::byte *low = src.part[0], *high = low + 128, *small = high + 64;
    const float d = f16_or_nan(small + 16);
    for (int g = 0; g < 16; ++g, w += 16) {
      const float scale = d * static_cast<float>(static_cast<std::int8_t>(small[g]));
      const int half = g / 8, i = g % 8 * 16;
      for (int j = 0; j < 16; ++j) {
        const int nibble = static_cast<int>(low[64 * half + i % 64 + j]) >> (i / 64 * 4) & 15;
        const int q = nibble | (static_cast<int>(high[32 * half + i % 32 + j]) >> (i / 32 * 2) & 3) << 4;
        w[j] = scale * static_cast<float>(q - zero);
      }
    }
  }
  static bool repack(const RawBlock& src, int column, int /*b*/, int /*columns*/, std::byte* tile) {
    const std::byte *low = src.part[0], *high = low + 128, *small = high + 64, *d = small + 16;
    if (!f16_finite(d)) return false;
    std::memcpy(half_at(tile, 0, 0, column), d, 2);
    for (int g = 0; g < 16; ++g) tile_word(tile, 1 + g / 4, column)[g % 4] = small[g];
    for (int k = 0; k < 256; k += 8) {  // 128 consecutive k share 64 bytes of nibbles and 32 bytes of high bits
      const int half = k / 128, i = k % 128;
      put_fields<4>(tile, scale_rows, column, k, load_as<std::uint64_t>(low + 64 * half + i % 64) >> (i / 64 * 4));
      put_fields<2>(tile, high_row, column, k, load_as<std::uint64_t>(high + 32 * half + i % 32) >> (i / 32 * 2));
    }
    return true;
  }
};

}  // namespace ktmoe
