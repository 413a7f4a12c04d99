// Rows times a block format in integers: activations are int8 with one scale per 32 k, levels are bytes, sums are exact.
//
//   w x ~ sum over spans of  x_scale * (scale * sum((q - zero) x8) - shift * sum(x8))
// where q are bytes, zero belongs to the format, scale and shift of BlockWeights to a block; a format has zero or shift.
// Include inside the namespace of a level, after unpack-inl.h, dot-inl.h, weight_order-inl.h and row_groups-inl.h.

// The levels as bytes, in pairs of quads.
template <class V, class Fmt>
struct BlockLevels {
  using I = typename V::I;
  static constexpr bool kFromZero = HasLevels<Fmt> && requires { Fmt::zero; };
  static constexpr bool kUnsigned = Fmt::bits < 8 && (kFromZero || !HasLevels<Fmt>);  // 0 .. 63, which maddubs takes
  static constexpr bool kTwoScales = Fmt::bits == 6;                                  // one for each 16 k
  static constexpr bool kShift = kUnsigned && !requires { Fmt::zero; };
  static constexpr int kZero = [] {
    if constexpr (requires { Fmt::zero; }) return int{Fmt::zero};
    return !kUnsigned && Int8Dot<V>::unsigned_weights ? 128 : 0;  // signed bytes, which VNNI takes as unsigned ones
  }();

  // Whole bytes, of which fewer than kAskRows rows leave asking to the hardware.
  static constexpr bool kHardwareAsks = V::kHardwareAsks && Fmt::bits == 8;
  static constexpr int kAskRows = kHardwareAsks ? 6 : V::kAskRows;
  static constexpr int kAsked = -1;
  // For R rows, 0 for any number, kAsked if this has been done. A few leave asking for whole bytes to the hardware, and are faster with
  // less ahead in the large tiles of K-quants.
  template <int R>
  static inline __attribute__((always_inline)) void ask(const std::byte* at) {
    constexpr bool kFew = R && R < kAskRows;
    constexpr Ask kAsk = !kFew ? Ask::always : Fmt::bits == 8 ? Ask::in_halves : Ask::unpacked;
    if constexpr (R != kAsked) ask_ahead<V, kAsk, kFew && Fmt::k_step == 256 ? V::kAhead / 2 : V::kAhead>(at);
  }

  struct Pair {
    I first, second;
  };
  // Quads 2 i and 2 i + 1 of a span, in the order of BlockOperand.
  template <int i, int R>
  static inline __attribute__((always_inline)) Pair pair(const std::byte* tile, int span) {
    constexpr int kRowsOfPair = Fmt::bits == 8 ? 2 : 1;
    const std::byte* at = tile + kRowBytes * (Fmt::scale_rows + (4 * span + i) * kRowsOfPair);
    for (int row = 0; row < kRowsOfPair; ++row) ask<R>(at + kRowBytes * row);
    if constexpr (Fmt::bits == 8) {
      return {Int8Dot<V>::of(V::load_i(at)), Int8Dot<V>::of(V::load_i(at + kRowBytes))};
    } else {
      const I word = V::load_i(at);
      const I low = V::and_i(word, 0x0f0f0f0f), high = V::and_i(V::template shr<4>(word), 0x0f0f0f0f);
      if constexpr (kFromZero) {
        return {V::lookup_bytes(low, kLevelsFromZero<Fmt>.at), V::lookup_bytes(high, kLevelsFromZero<Fmt>.at)};
      } else if constexpr (HasLevels<Fmt>) {
        return {Int8Dot<V>::of(V::lookup_bytes(low, Fmt::levels)), Int8Dot<V>::of(V::lookup_bytes(high, Fmt::levels))};
      } else if constexpr (Fmt::bits == 4) {
        return {low, high};
      } else {  // one or two more bits of each level, those of a span in one row or two
        constexpr int kMore = Fmt::bits - 4, kMask = kMore == 1 ? 0x10101010 : 0x30303030, kFrom = kMore == 1 ? 2 * i : 4 * (i % 2);
        const std::byte* more = tile + kRowBytes * (Fmt::high_row + (kMore == 1 ? span : 2 * span + i / 2));
        if constexpr (kFrom == 0) ask<R>(more);
        const I bits = V::load_i(more);
        return {V::or_i(low, V::and_i(move_bit<V, kFrom, 4>(bits), kMask)),
                V::or_i(high, V::and_i(move_bit<V, kFrom + kMore, 4>(bits), kMask))};
      }
    }
  }
};

// int8 activations:
//   for each span of 32 k and row 8 quads, in the order in which the levels leave theirs;
//   then for each span and row kOwn words: x_scale, and what zero or shift add: -zero * sum(x8), of each 16 k apart where these have a
//   scale of their own, or x_scale * sum(x8)
template <class V, class Fmt>
struct BlockOperand {
  using F = typename V::F;
  using Levels = BlockLevels<V, Fmt>;
  static constexpr int kQuads = 8;
  static constexpr int kOwn = Levels::kTwoScales ? 3 : Levels::kShift || Levels::kZero ? 2 : 1;

  static std::size_t bytes(int m, int padded) { return static_cast<std::size_t>(m) * (padded / 32) * (kQuads + kOwn) * 4; }

  // m rows of k columns, padded to `padded`. A span with a number that is not finite gets scale NaN.
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) {
    auto* words = reinterpret_cast<std::uint32_t*>(dst);
    auto* own = words + padded / 32 * kQuads * m;
    for (int r = 0; r < m; ++r) {
      const bf16* row = rows.row<bf16>(r);
      for (int j = 0; j < padded / 32; ++j) pack_span(row, 32 * j, k, words + (j * m + r) * kQuads, own + (j * m + r) * kOwn);
    }
  }

 private:
  using I = typename V::I;
  static void pack_span(const bf16* row, int j, int k, std::uint32_t* words, std::uint32_t* own) {
    const F x[2] = {load_row<V>(row, j, k), load_row<V>(row, j + 16, k)};
    const float scale = V::hmax(V::max(V::abs(x[0]), V::abs(x[1]))) / 127.0f;
    const float inverse = scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f;
    std::int8_t bytes[32];
    F level[2];  // NaN instead of a number that is not finite
    for (int i = 0; i < 2; ++i) {
      const I rounded = V::to_i(V::mul(x[i], V::set(inverse)));
      V::store_s8(bytes + 16 * i, rounded);
      level[i] = V::add(V::to_f(rounded), V::mul(x[i], V::set(0.0f)));
    }
    for (int i = 0; i < 4; ++i) {
      std::uint64_t quads = load_as<std::uint64_t>(bytes + 8 * i);
      if constexpr (Fmt::bits < 8) quads = even_then_odd(quads);  // as nibbles come; bytes are four consecutive k
      std::memcpy(words + 2 * i, &quads, 8);
    }
    const float sum[2] = {V::hsum(Levels::kTwoScales ? level[0] : V::add(level[0], level[1])),
                          Levels::kTwoScales ? V::hsum(level[1]) : 0.0f};
    const bool finite = sum[0] - sum[0] == 0.0f && sum[1] - sum[1] == 0.0f;
    const float x_scale = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    own[0] = std::bit_cast<std::uint32_t>(x_scale);
    for (int i = 1; i < kOwn; ++i)
      own[i] = Levels::kShift ? std::bit_cast<std::uint32_t>(x_scale * sum[0])
                              : static_cast<std::uint32_t>(finite ? -Levels::kZero * static_cast<int>(sum[i - 1]) : 0);
  }
  // Bytes 0 .. 7 -> 0, 2, 4, 6, 1, 3, 5, 7.
  static std::uint64_t even_then_odd(std::uint64_t x) {
    std::uint64_t t = (x ^ x >> 8) & 0x0000ff000000ff00u;
    x ^= t ^ t << 8;
    t = (x ^ x >> 16) & 0x00000000ffff0000u;
    return x ^ t ^ t << 16;
  }
};

template <class V, class Fmt>
struct BlockDot {
  using F = typename V::F;
  using I = typename V::I;
  using Scales = typename BlockWeights<V, Fmt>::Scales;
  using Levels = BlockLevels<V, Fmt>;
  using Operand = BlockOperand<V, Fmt>;
  static constexpr int kAsked = Levels::kAsked;
  // Plain loops multiply signed bytes slowly.
  static constexpr int kMostRows = V::kPlainLoops && !Levels::kUnsigned && !V::kVnni ? 4 : kMostBlockRows;

  static std::size_t bytes(int m, int padded) { return Operand::bytes(m, padded); }
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) { Operand::pack(rows, m, k, padded, dst); }
  static void panel(const std::byte* operand, int m, int /*padded*/, const std::byte* panel, int k_steps, float* c, std::ptrdiff_t ldc,
                    bool accumulate) {
    auto run_rows = &run<0>;
    if constexpr (kKnownRows > 0)
      if (m <= kKnownRows) run_rows = for_rows<kKnownRows>(m, [](auto rows) { return &run<rows>; });
    run_rows(panel, k_steps, operand, m, c, ldc, accumulate);
  }

 private:
  // Sums of 16 bits hold 16 k of 4- and 5-bit levels, MXFP4's among them (4 * 2 * 31 * 127 = 31496), and 32 k of 4-bit ones
  // (8 * 2 * 15 * 127 = 30480); of 6-bit levels 8 k (2 * 2 * 63 * 127 = 32004). VNNI sums four products to 32 bits at once.
  static constexpr bool kNarrow = !V::kVnni && Levels::kUnsigned && Fmt::bits < 6;
  static constexpr bool kNarrowSpan = kNarrow && Fmt::bits == 4 && !Levels::kFromZero;

  // Up to so many rows have code for their number: one, two (in plain loops that gains nothing), and of whole bytes those that leave asking
  // to the hardware. Levels whose parts lie apart have none on AVX-512 in order: the hardware does not foresee them.
  static constexpr bool kApart = Fmt::bits == 5 || Fmt::bits == 6;
  static constexpr bool kNone = V::kInOrder && V::kTiles == 2 && kApart;
  static constexpr int kKnownRows = V::kPlainLoops ? 1 : kNone ? 0 : Levels::kHardwareAsks ? Levels::kAskRows - 1 : 2;

  // R = m, or 0 for any number.
  template <int R>
  static void run(const std::byte* panel, int k_steps, const std::byte* operand, int m, float* c, std::ptrdiff_t ldc, bool accumulate) {
    constexpr int kSpans = Fmt::k_step / 32, kTile = Fmt::rows * kRowBytes;
    // There are registers for the levels of both, and the hardware is not to find them in order.
    constexpr bool kBothTiles = R == 0 && V::kVnni && V::kTiles == 2 && !Levels::kHardwareAsks;
    const int rows = R ? R : m;
    const auto* x = reinterpret_cast<const std::uint32_t*>(operand);
    const auto* own = x + k_steps * kSpans * Operand::kQuads * rows;
    F sum[2][R ? R : kMostRows];
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < rows; ++r) sum[t][r] = accumulate ? V::load(c + r * ldc + 16 * t) : V::set(0.0f);
    for (int s = 0; s < k_steps; ++s, panel += 2 * kTile, x += kSpans * Operand::kQuads * rows, own += kSpans * Operand::kOwn * rows)
      if constexpr (kBothTiles) {
        for (int span = 0; span < kSpans; ++span) {
          if constexpr (V::kInOrder) {  // a part of the lines with each span
            constexpr int kLines = 2 * Fmt::rows;
            for (int line = kLines * span / kSpans; line < kLines * (span + 1) / kSpans; ++line) Levels::template ask<R>(panel + 64 * line);
          } else if (span == 0) {
            ask_scales<R>(panel);
            ask_scales<R>(panel + kTile);
          }
          add_both(panel, span, x + span * Operand::kQuads * rows, own + span * Operand::kOwn * rows, rows, sum);
        }
      } else {
        in_tiles<V, kSpans, true>([&](auto t, int span) __attribute__((always_inline)) {
          const std::byte* tile = panel + t * kTile;
          if (span == 0) ask_scales<R>(tile);
          add_span<R>(tile, span, x + span * Operand::kQuads * rows, own + span * Operand::kOwn * rows, rows, sum[t]);
        });
      }
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < rows; ++r) V::store(c + r * ldc + 16 * t, sum[t][r]);
  }

  template <int R>
  static inline __attribute__((always_inline)) void ask_scales(const std::byte* tile) {
    for (int row = 0; row < Fmt::scale_rows; ++row) Levels::template ask<R>(tile + kRowBytes * row);
  }

  // The rows pass by 16 k of a tile, then by the other 16.
  template <int R>
  static inline __attribute__((always_inline)) void add_span(const std::byte* tile, int span, const std::uint32_t* x,
                                                             const std::uint32_t* own, int rows, F* sum) {
    const Scales scales = BlockWeights<V, Fmt>::scales(tile, span);
    const Quads a = quads<0, R>(tile, span);
    I first[R ? R : kMostRows];
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      const std::uint32_t* words = x + Operand::kQuads * r;
      first[r] = kNarrow ? narrow_sum(a, words) : add_products(start<0>(own + Operand::kOwn * r), a, words);
    }
    const Quads b = quads<1, R>(tile, span);
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r, own += Operand::kOwn) {
      const std::uint32_t* words = x + Operand::kQuads * r + 4;
      I whole[2] = {first[r], first[r]};
      if constexpr (kNarrowSpan)
        whole[0] = V::pairs(start<0>(own), V::add16(first[r], narrow_sum(b, words)));
      else if constexpr (kNarrow)
        whole[0] = V::pairs(V::pairs(start<0>(own), first[r]), narrow_sum(b, words));
      else
        whole[Levels::kTwoScales] = add_products(Levels::kTwoScales ? start<1>(own) : first[r], b, words);
      sum[r] = add_scaled(sum[r], scales, whole, own);
    }
  }

  // The rows pass by 32 k of both tiles, which share what is loaded of x.
  static inline __attribute__((always_inline)) void add_both(const std::byte* panel, int span, const std::uint32_t* x,
                                                             const std::uint32_t* own, int rows, F (&sum)[2][kMostRows]) {
    const std::byte* tile[2] = {panel, panel + Fmt::rows * kRowBytes};
    const Scales scales[2] = {BlockWeights<V, Fmt>::scales(tile[0], span), BlockWeights<V, Fmt>::scales(tile[1], span)};
    constexpr int R = V::kInOrder ? kAsked : 0;
    const Quads a[2] = {quads<0, R>(tile[0], span), quads<0, R>(tile[1], span)};
    const Quads b[2] = {quads<1, R>(tile[0], span), quads<1, R>(tile[1], span)};
    for (int r = 0; r < rows; ++r, x += Operand::kQuads, own += Operand::kOwn) {
      I first[2] = {start<0>(own), start<0>(own)}, second[2] = {start<1>(own), start<1>(own)};
      add_products(first, a, x);
      add_products(Levels::kTwoScales ? second : first, b, x + 4);
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        const I whole[2] = {first[t], second[t]};
        sum[t][r] = add_scaled(sum[t][r], scales[t], whole, own);
      }
    }
  }

  struct Quads {
    I of[4];  // 16 k of 16 columns
  };
  template <int half, int R>
  static inline __attribute__((always_inline)) Quads quads(const std::byte* tile, int span) {
    const auto a = Levels::template pair<2 * half, R>(tile, span), b = Levels::template pair<2 * half + 1, R>(tile, span);
    return {{a.first, a.second, b.first, b.second}};
  }
  static inline __attribute__((always_inline)) I word(const std::uint32_t* x) { return V::set_i(static_cast<std::int32_t>(*x)); }
  template <int i>
  static inline __attribute__((always_inline)) I start(const std::uint32_t* own) {
    return Levels::kZero && 1 + i < Operand::kOwn ? word(own + 1 + i) : V::set_i(0);
  }

  // sum + 16 k, in 32 bits.
  static inline __attribute__((always_inline)) I add_products(I sum, const Quads& w, const std::uint32_t* x) {
    if constexpr (V::kVnni) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum = V::dpbusd(sum, w.of[j], word(x + j));
      return sum;
    } else if constexpr (Levels::kUnsigned) {
      return V::pairs(V::pairs(sum, narrow_sum8(w, x, 0)), narrow_sum8(w, x, 2));
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum = V::pairs(sum, V::maddss(w.of[j], word(x + j)));
      return sum;
    }
  }
  // Of both tiles, with VNNI.
  static inline __attribute__((always_inline)) void add_products(I (&sum)[2], const Quads (&w)[2], const std::uint32_t* x) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const I quad = word(x + j);
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) sum[t] = V::dpbusd(sum[t], w[t].of[j], quad);
    }
  }
  // 16 k in 16 bits.
  static inline __attribute__((always_inline)) I narrow_sum(const Quads& w, const std::uint32_t* x) {
    return V::add16(narrow_sum8(w, x, 0), narrow_sum8(w, x, 2));
  }
  static inline __attribute__((always_inline)) I narrow_sum8(const Quads& w, const std::uint32_t* x, int j) {
    return V::add16(V::maddubs(w.of[j], word(x + j)), V::maddubs(w.of[j + 1], word(x + j + 1)));
  }

  // sum + what a span gives, from the integer sums of all 32 k in whole[0], or of each 16 k.
  static inline __attribute__((always_inline)) F add_scaled(F sum, const Scales& scales, const I (&whole)[2], const std::uint32_t* own) {
    const F x_scale = V::as_f(word(own));
    sum = V::fma(V::mul(scales.scale[0], x_scale), V::to_f(whole[0]), sum);
    if constexpr (Levels::kTwoScales) sum = V::fma(V::mul(scales.scale[1], x_scale), V::to_f(whole[1]), sum);
    if constexpr (Levels::kShift) sum = V::fma(V::sub(V::set(0.0f), scales.shift), V::as_f(word(own + 1)), sum);
    return sum;
  }
};
