// From stored tiles to numbers: levels of the block formats, and the direct tiles that UNPACKED formats become in cache.
// Include inside the namespace of a level, after Vec.

// Bit `from` of each lane, and the others with it, moved to bit `to`.
template <class V, int from, int to>
static inline __attribute__((always_inline)) typename V::I move_bit(typename V::I x) {
  if constexpr (from > to)
    return V::template shr<from - to>(x);
  else
    return V::template shl<to - from>(x);
}

// Codes of four bits that stand for levels of a table.
template <class Fmt>
concept HasLevels = requires { Fmt::levels; };
// What the 16 codes of four bits stand for, as floats: tables for V::lookup.
template <HasLevels Fmt>
struct LevelFloats {
  float at[16];
  constexpr LevelFloats() : at{} {
    for (int i = 0; i < 16; ++i) at[i] = Fmt::levels[i];
  }
};
template <HasLevels Fmt>
inline constexpr LevelFloats<Fmt> kLevelFloats;
// The same as bytes that are never negative, of a format that says how far down its levels go.
template <HasLevels Fmt>
struct LevelsFromZero {
  std::int8_t at[16];
  constexpr LevelsFromZero() : at{} {
    for (int i = 0; i < 16; ++i) at[i] = static_cast<std::int8_t>(Fmt::levels[i] + Fmt::zero);
  }
};
template <HasLevels Fmt>
inline constexpr LevelsFromZero<Fmt> kLevelsFromZero;
inline constexpr float kNibbles[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Weights of a block format, 16 columns at a time, span by span: a span is 32 consecutive k, what one bf16 tile holds.
// w = level * scale - shift is exact in fp32, or rounds once, in the same way on every level; see the format's own file.
template <class V, class Fmt>
struct BlockWeights {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kDistance = 4096;  // bytes that a stream from memory is asked for ahead of its use

  struct Scales {
    F scale[2], shift;  // of k < 16 and k >= 16 of the span
  };

  // use(k, w) for k = 0 .. 31 of a span, in order.
  template <class Use>
  static inline __attribute__((always_inline)) void each(const std::byte* tile, int span, Use use) {
    if constexpr (V::kPlainLoops) {
      for (int k = 0; k < 32; ++k) use(k, V::each([&](int column) { return Fmt::dequantize(tile, column, 32 * span + k, 1.0f); }));
    } else {
      const Scales s = scales(tile, span);
      each(tile + kRowBytes * Fmt::scale_rows, span, s, use, std::make_integer_sequence<int, 32>{});
    }
  }

  static inline __attribute__((always_inline)) Scales scales(const std::byte* tile, int span) {
    Scales s{};
    if constexpr (requires { Fmt::high_row; }) {  // K-quants
      const F d = V::load_f16(half_at(tile, 0, 0, 0));
      if constexpr (Fmt::bits == 6) {
        const I row = V::load_i(tile_word(tile, 1 + span / 2, 0));
        const I low = span % 2 ? row : V::template shl<16>(row);
        s.scale[0] = V::mul(d, V::to_f(V::template sar<24>(V::template shl<8>(low))));
        s.scale[1] = V::mul(d, V::to_f(V::template sar<24>(low)));
      } else {
        const I row = V::load_i(tile_word(tile, 1 + span / 2, 0));
        const I both = span % 2 ? V::template shr<16>(row) : row;
        s.scale[0] = s.scale[1] = V::mul(d, byte_of<0>(both));
        s.shift = V::mul(V::load_f16(half_at(tile, 0, 1, 0)), byte_of<1>(both));
      }
    } else if constexpr (std::is_same_v<Fmt, Fp8Format>) {
      s.scale[0] = s.scale[1] = V::load(reinterpret_cast<const float*>(tile));
    } else if constexpr (requires { Fmt::exponents; }) {
      const I e = byte_at(V::load_i(tile_word(tile, 0, 0)), span);
      s.scale[0] = s.scale[1] = V::mul(V::as_f(V::template shl<23>(e)), V::set(0.5f));
      s.shift = V::mul(s.scale[0], V::set(Fmt::zero));
    } else {  // a half-width scale for each block
      const std::byte* at = half_at(tile, 0, 32 * span / Fmt::block, 0);
      constexpr bool kBf16 = std::size(Fmt::parts) > 1;
      s.scale[0] = s.scale[1] = kBf16 ? V::load_bf16(reinterpret_cast<const bf16*>(at)) : V::load_f16(at);
      if constexpr (requires { Fmt::zero_row; }) {
        s.shift = V::mul(s.scale[0], V::to_f(byte_at(V::load_i(tile_word(tile, Fmt::zero_row, 0)), 32 * span / Fmt::block)));
      } else if constexpr (requires { Fmt::zero; }) {
        s.shift = V::mul(s.scale[0], V::set(Fmt::zero));
      }
    }
    return s;
  }

 private:
  template <class Use, int... k>
  static inline __attribute__((always_inline)) void each(const std::byte* levels, int span, const Scales& s, Use& use,
                                                         std::integer_sequence<int, k...>) {
    (use(k, weight<k>(levels, span, s)), ...);
  }

  template <int i>
  static inline __attribute__((always_inline)) F byte_of(I row) {
    return V::to_f(V::and_i(V::template shr<8 * i>(row), 255));
  }

  // Byte i of each word.
  static inline __attribute__((always_inline)) I byte_at(I row, int i) {
    const I pair = i & 2 ? V::template shr<16>(row) : row;
    return V::and_i(i & 1 ? V::template shr<8>(pair) : pair, 255);
  }

  // Where levels are found or made several k at once, the compiler shares that among them.
  template <int k>
  static inline __attribute__((always_inline)) F weight(const std::byte* levels, int span, const Scales& s) {
    constexpr int per_word = Fmt::bits == 8 ? 4 : 8;
    const std::byte* at = levels + kRowBytes * (32 / per_word) * span + kRowBytes * (k / per_word);
    if constexpr (k % per_word == 0) __builtin_prefetch(at + kDistance, 0, 2);
    const I row = V::load_i(at);
    const F scale = s.scale[Fmt::bits == 6 ? k / 16 : 0];
    if constexpr (std::is_same_v<Fmt, Fp8Format>) {  // k and k + 1 as bf16
      const I both = V::and_i(V::template sar16<4>(V::template upper_bytes<k % 4 / 2 * 2>(row)), static_cast<std::int32_t>(0x87f087f0u));
      return V::mul(V::as_f(k % 2 ? V::and_i(both, static_cast<std::int32_t>(0xffff0000u)) : V::template shl<16>(both)), scale);
    } else if constexpr (Fmt::bits == 8) {
      return V::mul(top<k % 4>(row), V::mul(scale, V::set(0x1p-24f)));
    } else if constexpr (Fmt::bits > 4) {  // a byte for every other k of the row's eight
      constexpr int kHigh = Fmt::bits == 5 ? 0x10101010 : 0x30303030;
      const I high = V::load_i(levels + kRowBytes * (Fmt::high_row - Fmt::scale_rows + (Fmt::bits == 5 ? span : 2 * span + k / 16)));
      const I four = V::or_i(V::and_i(k % 2 ? V::template shr<4>(row) : row, 0x0f0f0f0f),
                             V::and_i(move_bit<V, field_shift<Fmt::bits - 4>(k) % 8, 4>(high), kHigh));
      F shift = s.shift;
      if constexpr (requires { Fmt::zero; }) shift = V::mul(scale, V::set(Fmt::zero));  // of each 16 k
      return V::fma(top<k % 8 / 2>(four), V::mul(scale, V::set(0x1p-24f)), V::sub(V::set(0.0f), shift));
    } else if constexpr (HasLevels<Fmt>) {
      if constexpr (V::kFloatTables) {
        return V::mul(V::lookup(V::template shr<k % 8 * 4>(row), kLevelFloats<Fmt>.at), scale);
      } else {
        const I four = V::lookup_bytes(V::and_i(k % 2 ? V::template shr<4>(row) : row, 0x0f0f0f0f), Fmt::levels);
        if constexpr (requires { Fmt::exponents; })  // some are too small for the way below
          return V::mul(V::mul(top<k % 8 / 2>(four), V::set(0x1p-24f)), scale);
        else
          return V::mul(top<k % 8 / 2>(four), V::mul(scale, V::set(0x1p-24f)));
      }
    } else {
      return V::fma(nibble<k % 8>(row), scale, V::sub(V::set(0.0f), s.shift));
    }
  }

  // Signed byte b of each word, times 2^24: no need to move it down first, since scales times 2^-24 are exact.
  template <int b>
  static inline __attribute__((always_inline)) F top(I row) {
    return V::to_f(V::template top_byte<b>(row));
  }
  template <int i>
  static inline __attribute__((always_inline)) F nibble(I row) {
    if constexpr (V::kFloatTables)
      return V::lookup(V::template shr<4 * i>(row), kNibbles);
    else
      return V::to_f(V::and_i(V::template shr<4 * i>(row), 15));
  }
};

// m and o of the four blocks of an int4 tile, in the words of its columns.
template <class V>
struct Int4Codes {
  using I = typename V::I;
  I m4, z4;  // a byte for each block: m, and 15 + z

  explicit Int4Codes(const std::byte* tile) {
    const I codes = V::load_i(tile);
    m4 = V::add_i(V::and_i(codes, 0x0f0f0f0f), V::set_i(0x01010101));
    z4 = V::add_i(V::and_i(V::template shr<4>(codes), 0x0f0f0f0f), V::set_i(0x0f0f0f0f));
  }
  template <int b>
  I m() const {  // m in both 16-bit halves
    return V::template spread<b>(m4);
  }
  // o of blocks b and b + 1 in each byte, or o - 128: m q - (o - 128) is the weight + 128.
  template <int b, bool kLess128>
  void o_bytes(I (&o)[2]) const {
    const I both = kLess128 ? V::sub8(o_pair<b>(), V::set_i(static_cast<std::int32_t>(0x80808080u))) : o_pair<b>();
    o[0] = V::template all_bytes<0>(both);
    o[1] = V::template all_bytes<2>(both);
  }
  template <int b>
  I o_pair() const {  // of block b in the low half, of b + 1 in the high one
    return offsets(V::mulhi16(V::template upper_bytes<b>(z4), V::template upper_bytes<b>(m4)));
  }

 private:
  static I offsets(I zm) { return V::mulhi16(zm, V::set_i(21846 * 0x00010001)); }  // (15 + z) m / 3, exact below 2^15
};

template <class V>
struct Unpack {
  using F = typename V::F;
  using I = typename V::I;

  // The 32 k of direct k-step `step` of tile t of panel p, as 32 rows of 16 floats. Block formats only.
  static void floats(const PackedMatrix& w, int p, int t, int step, float* __restrict dst) {
    switch (w.layout().format) {
#define KTMOE_FORMAT(id, traits) \
  case WeightFormat::id:         \
    return;
#define KTMOE_BLOCK_FORMAT(id, traits)                                                                \
  case WeightFormat::id:                                                                              \
    return BlockWeights<V, traits>::each(stored<traits>(w, p, t, step), step % (traits::k_step / 32), \
                                         [&](int k, F x) __attribute__((always_inline)) { V::store(dst + 16 * k, x); });
#include "format/formats.inc"
#undef KTMOE_FORMAT
    }
  }

  // Direct k-step `step` of tile t of panel p, as a 1 KB tile of w.layout().direct().
  static void tile(const PackedMatrix& w, int p, int t, int step, std::byte* dst) {
    switch (w.layout().format) {
      case WeightFormat::bf16:
      case WeightFormat::int8:
        std::memcpy(dst, w.tile(p, t, step), kTileBytes);
        return;
      case WeightFormat::int4:
        return int4_tile(stored<Int4Format>(w, p, t, step), dst);
#define KTMOE_FORMAT(id, traits)
#define KTMOE_BLOCK_FORMAT(id, traits) \
  case WeightFormat::id:               \
    return bf16_tile<traits>(stored<traits>(w, p, t, step), step % (traits::k_step / 32), dst);
#include "format/formats.inc"
#undef KTMOE_FORMAT
    }
  }

 private:
  // The stored tile that direct k-step `step` comes from. Not PackedMatrix::tile: a tile takes so few cycles that looking up its format's
  // sizes, and dividing by them, would show.
  template <class Fmt>
  static const std::byte* stored(const PackedMatrix& w, int p, int t, int step) {
    constexpr int kPerTile = Fmt::k_step / (Fmt::int8_products ? 64 : 32);
    return w.panel(p) + static_cast<std::ptrdiff_t>(Fmt::rows * kRowBytes) * (2 * (step / kPerTile) + t);
  }
  // __restrict: what is found several k at once must not be found again after each store.
  template <class Fmt>
  static void bf16_tile(const std::byte* src, int span, std::byte* __restrict dst) {
    F even{};
    BlockWeights<V, Fmt>::each(src, span, [&](int k, F w) __attribute__((always_inline)) {
      if (k % 2)
        V::store_i(dst + kRowBytes * (k / 2), V::bf16_pairs(even, w));
      else
        even = w;
    });
  }

  // int8 = m q - o by 16-bit multiplication of two bytes at once: q m <= 240, so the low byte never carries into the high one.
  static void int4_tile(const std::byte* src, std::byte* dst) {
    const Int4Codes<V> codes(src);
    int4_blocks<0>(codes, src, dst);
    int4_blocks<2>(codes, src, dst);
  }
  // Blocks b and b + 1, whose levels share bytes.
  template <int b>
  static inline __attribute__((always_inline)) void int4_blocks(const Int4Codes<V>& codes, const std::byte* src, std::byte* dst) {
    const I m[2] = {codes.template m<b>(), codes.template m<b + 1>()};
    I o[2];
    codes.template o_bytes<b, false>(o);
    for (int r = 0; r < 4; ++r) {
      const std::byte* at = src + kRowBytes * (1 + 2 * b + r);
      __builtin_prefetch(at + 4096, 0, 2);
      const I row = V::load_i(at);
      const I q[2] = {V::and_i(row, 0x0f0f0f0f), V::and_i(V::template shr<4>(row), 0x0f0f0f0f)};
      for (int i = 0; i < 2; ++i) V::store_i(dst + kRowBytes * (4 * (b + i) + r), V::sub8(V::mullo16(q[i], m[i]), o[i]));
    }
  }
};
