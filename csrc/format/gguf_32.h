// GGUF blocks of 32 with one scale d, an f16 but for MXFP4: Q4_0, IQ4_NL, MXFP4, Q8_0. Kept as they are, 16 columns interleaved.
//
//   Q4_0    w = d (q - 8),      q in 0..15;  byte j of the block: k = j (low nibble), k = j + 16 (high nibble)
//   IQ4_NL  w = d levels[q],    same bytes
//   MXFP4   w = d levels[q]/2,  same bytes;  d = 2^(e - 127), e the first byte of the block; the levels are those of e2m1, doubled
//   Q8_0    w = d q,            q signed
//   tile for two blocks: row 0 = 16 d of block 0 | 16 d of block 1; then nibbles (8 consecutive k in a word) or bytes (4)
//   MXFP4, four blocks:  row 0 = a word of each column: e of blocks 0, 1, 2, 3
// The e of MXFP4 is used as the exponent of a float, where zero is no power of two: 2^-127 counts as zero, the only numbers that are not
// kept in value. e > 252, of which some weights would be infinite, is refused.
#pragma once

#include "format/tile.h"

namespace ktmoe {

template <int kStep>
struct Gguf4Bit {
  static constexpr int k_step = kStep;
  static constexpr int rows = 1 + k_step / 8;
  static constexpr bool int8_products = false;
  static constexpr bool has_scales = false;
  static constexpr int scale_rows = 1, bits = 4, block = 32;

  static int code(const std::byte* tile, int column, int k) { return get_field<4>(tile, 1, column, k); }
  static float f16_scale(const std::byte* tile, int column, int k) {
    return f16_to_float(load_as<std::uint16_t>(half_at(tile, 0, k / 32, column)));
  }
  // f(q) * scale of 32 codes.
  template <class Level>
  static void decode_codes(const std::byte* codes, float scale, Level level, float* w) {
    for (int j = 0; j < 16; ++j) {
      const int both = static_cast<int>(codes[j]);
      w[j] = static_cast<float>(level(both & 15)) * scale;
      w[j + 16] = static_cast<float>(level(both >> 4)) * scale;
    }
  }
  static bool repack_f16(const RawBlock& src, int column, int b, std::byte* tile) {
    if (!f16_finite(src.part[0])) return false;
    std::memcpy(half_at(tile, 0, b, column), src.part[0], 2);
    repack_codes(src.part[0] + 2, column, b, tile);
    return true;
  }
  static void repack_codes(const std::byte* codes, int column, int b, std::byte* tile) {
    for (int j = 0; j < 16; j += 8) {
      const auto both = load_as<std::uint64_t>(codes + j);
      put_fields<4>(tile, 1, column, 32 * b + j, both);
      put_fields<4>(tile, 1, column, 32 * b + 16 + j, both >> 4);
    }
  }
};

struct Q4_0Format : Gguf4Bit<64> {
  static constexpr const char* name = "q4_0";
  static constexpr bool from_floats = true;
  static constexpr std::int8_t zero = 8;
  static constexpr RawPart parts[] = {{32, 18}};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    return static_cast<float>(code(tile, column, k) - zero) * f16_scale(tile, column, k);
  }
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    decode_codes(src.part[0] + 2, f16_or_nan(src.part[0]), [](int q) { return q - zero; }, w);
  }
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) { return repack_f16(src, column, b, tile); }
};

struct Iq4NlFormat : Gguf4Bit<64> {
  static constexpr const char* name = "iq4_nl";
  static constexpr bool from_floats = false;
  static constexpr RawPart parts[] = {{32, 18}};
  static constexpr std::int8_t levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    return static_cast<float>(levels[code(tile, column, k)]) * f16_scale(tile, column, k);
  }
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    decode_codes(src.part[0] + 2, f16_or_nan(src.part[0]), [](int q) { return levels[q]; }, w);
  }
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) { return repack_f16(src, column, b, tile); }
};

struct Mxfp4Format : Gguf4Bit<128> {
  static constexpr const char* name = "mxfp4";
  static constexpr bool from_floats = true;
  static constexpr RawPart parts[] = {{32, 17}};
  static constexpr std::int8_t levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  static constexpr std::int8_t zero = 12;  // levels + zero are 0 .. 24
  static constexpr bool exponents = true;

  static float dequantize(const std::byte* tile, int column, int k, float /*scale*/) {
    const std::uint32_t bits = static_cast<std::uint32_t>(tile_word(tile, 0, column)[k / 32]) << 23;
    return static_cast<float>(levels[code(tile, column, k)]) * (0.5f * load_as<float>(&bits));
  }
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    const auto e = static_cast<std::uint32_t>(src.part[0][0]);
    const std::uint32_t bits = e == 255 ? 0x7fc00000 : e == 0 ? 0x00400000 : e << 23;
    decode_codes(src.part[0] + 1, load_as<float>(&bits), [](int q) { return 0.5f * static_cast<float>(levels[q]); }, w);
  }
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) {
    if (static_cast<int>(src.part[0][0]) > 252) return false;
    tile_word(tile, 0, column)[b] = src.part[0][0];
    repack_codes(src.part[0] + 1, column, b, tile);
    return true;
  }
};

struct Q8_0Format {
  static constexpr const char* name = "q8_0";
  static constexpr bool from_floats = true;
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
  static void decode(const RawBlock& src, int /*columns*/, float* w) {
    const float d = f16_or_nan(src.part[0]);
    for (int j = 0; j < 32; ++j) w[j] = static_cast<float>(static_cast<std::int8_t>(src.part[0][2 + j])) * d;
  }
  static bool repack(const RawBlock& src, int column, int b, int /*columns*/, std::byte* tile) {
    if (!f16_finite(src.part[0])) return false;
    std::memcpy(half_at(tile, 0, b, column), src.part[0], 2);
    for (int i = 0; i < 8; ++i) std::memcpy(tile_word(tile, 1 + 8 * b + i, column), src.part[0] + 2 + 4 * i, 4);
    return true;
  }
};

}  // namespace ktmoe
