// Few rows times a block format in integers: activations are int8 with one scale per 32 k, levels are bytes, sums are exact.
//
//   w x ~ sum over spans of  x_scale * (scale * sum(q x8) - shift * sum(x8))        scale and shift of BlockWeights
// Include inside the namespace of a level, after unpack-inl.h, dot-inl.h, weight_order-inl.h and row_groups-inl.h.

// The levels as bytes, in pairs of quads.
template <class V, class Fmt>
struct BlockLevels {
  using I = typename V::I;
  static constexpr bool kFromZero = requires { Fmt::zero; };
  static constexpr bool kUnsigned = Fmt::bits < 8 && (kFromZero || !HasLevels<Fmt>);  // 0 .. 63, which maddubs takes
  static constexpr bool kTwoScales = Fmt::bits == 6;                                  // one for each 16 k

  // For R rows, 0 for any number. A few leave asking for whole bytes to the hardware, and are faster with less ahead in the large tiles of
  // K-quants.
  template <int R>
  static inline __attribute__((always_inline)) void ask(const std::byte* at) {
    constexpr bool kFew = R && R < V::kAskRows;
    ask_ahead<V, kFew && Fmt::bits == 8 ? Ask::in_halves : Ask::always, kFew && Fmt::k_step == 256 ? V::kAhead / 2 : V::kAhead>(at);
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
      return {V::load_i(at), V::load_i(at + kRowBytes)};
    } else {
      const I word = V::load_i(at);
      const I low = V::and_i(word, 0x0f0f0f0f), high = V::and_i(V::template shr<4>(word), 0x0f0f0f0f);
      if constexpr (kFromZero) {
        return {V::lookup_bytes(low, kLevelsFromZero<Fmt>.at), V::lookup_bytes(high, kLevelsFromZero<Fmt>.at)};
      } else if constexpr (HasLevels<Fmt>) {
        return {V::lookup_bytes(low, Fmt::levels), V::lookup_bytes(high, Fmt::levels)};
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

// Activations of a group of rows:
//   x8, 8 quads for each span of 32 k, in the order in which the levels leave theirs;
//   then kScales for each span and row: x_scale, and for unsigned levels x_scale * sum(x8), of each 16 k apart where these have a scale of
//   their own; for signed levels that VNNI takes as unsigned ones what their integer sum starts from
// kByRow: the quads of a row of a span beside each other, [span][row][8]; otherwise [span][8][row].
template <class V, class Fmt, bool kByRow>
struct BlockOperand {
  using F = typename V::F;
  static constexpr bool kUnsigned = BlockLevels<V, Fmt>::kUnsigned, kTwoScales = BlockLevels<V, Fmt>::kTwoScales;
  static constexpr int kQuads = 8;
  static constexpr bool kStart = !kUnsigned && Int8Dot<V>::unsigned_weights;  // integer sums start from -128 sum(x8)
  static constexpr int kScales = kTwoScales ? 3 : kUnsigned || kStart ? 2 : 1;

  static int row_bytes(int padded) { return padded / 32 * (kQuads + kScales) * 4; }

  // Rows r0 .. r0 + n - 1. A span with a number that is not finite gets scale NaN.
  static void pack(RowSource rows, int r0, int n, int k, int padded, std::byte* dst) {
    auto* words = reinterpret_cast<std::uint32_t*>(dst);
    auto* scales = reinterpret_cast<float*>(words + padded / 32 * kQuads * n);
    for (int j = 0; j < padded; j += 32, words += kQuads * n, scales += kScales * n)
      for (int r = 0; r < n; ++r) {
        const bf16* row = rows.row<bf16>(r0 + r);
        const F first = load_row<V>(row, j, k), second = load_row<V>(row, j + 16, k);
        const F poison = V::add(V::mul(first, V::set(0.0f)), V::mul(second, V::set(0.0f)));
        const float scale = V::hmax(V::max(V::abs(first), V::abs(second))) / 127.0f;
        const float inverse = scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f;
        alignas(64) std::int8_t x[32];
        V::store_s8(x, V::to_i(V::mul(first, V::set(inverse))));
        V::store_s8(x + 16, V::to_i(V::mul(second, V::set(inverse))));
        for (int q = 0; q < kQuads; ++q) {
          std::int8_t quad[4];  // nibbles: even k, then odd k; bytes: four consecutive k
          for (int b = 0; b < 4; ++b) quad[b] = Fmt::bits == 8 ? x[4 * q + b] : x[8 * (q / 2) + 2 * b + q % 2];
          std::memcpy(words + (kByRow ? kQuads * r + q : q * n + r), quad, 4);
        }
        int sum[2] = {};
        for (int i = 0; i < 32; ++i) sum[i / 16] += x[i];
        float* own = scales + kScales * r;
        own[0] = V::hsum(poison) == 0.0f ? scale : std::numeric_limits<float>::quiet_NaN();
        if (kTwoScales)
          for (int i = 0; i < 2; ++i) own[1 + i] = own[0] * static_cast<float>(sum[i]);
        else if (kUnsigned)
          own[1] = own[0] * static_cast<float>(sum[0] + sum[1]);
        else if (kStart)
          reinterpret_cast<std::int32_t*>(own)[1] = -128 * (sum[0] + sum[1]);
      }
  }
};

// sum + what a span gives, from the integer sums of its levels and x8: of all 32 k in whole[0], or of each 16 k. own: see BlockOperand.
template <class V, class Fmt>
inline __attribute__((always_inline)) typename V::F add_scaled(typename V::F sum, const typename BlockWeights<V, Fmt>::Scales& scales,
                                                               const typename V::I* whole, const float* own) {
  using Levels = BlockLevels<V, Fmt>;
  const auto x_scale = V::set(own[0]);
  sum = V::fma(V::mul(scales.scale[0], x_scale), V::to_f(whole[0]), sum);
  if constexpr (Levels::kTwoScales) {
    sum = V::fma(V::mul(scales.scale[1], x_scale), V::to_f(whole[1]), sum);
    sum = V::fma(V::mul(scales.scale[0], V::set(-32.0f)), V::set(own[1]), sum);
    sum = V::fma(V::mul(scales.scale[1], V::set(-32.0f)), V::set(own[2]), sum);
  } else if constexpr (Levels::kUnsigned) {
    sum = V::fma(V::sub(V::set(0.0f), scales.shift), V::set(own[1]), sum);
  }
  return sum;
}

inline constexpr int kMostBlockRows = 16;  // more rows pay for unpacking the weights, and their activations stay exact

// Rows of an operand times a panel: add_span(tile, span, scales, x, own, sum) for each span of both tiles. R = rows, whose sums then may
// stay in registers, or 0 for any number up to kMostBlockRows.
template <class V, class Fmt, bool kByRow, int R, class AddSpan>
inline __attribute__((always_inline)) void walk_blocks(const std::byte* panel, int k_steps, const std::byte* operand, int rows, float* c,
                                                       std::ptrdiff_t ldc, bool accumulate, AddSpan add_span) {
  using Operand = BlockOperand<V, Fmt, kByRow>;
  constexpr int kSpans = Fmt::k_step / 32, kTile = Fmt::rows * kRowBytes;
  const auto* x = reinterpret_cast<const std::uint32_t*>(operand);
  const auto* own = reinterpret_cast<const float*>(x + k_steps * kSpans * Operand::kQuads * rows);
  typename V::F sum[2][R ? R : kMostBlockRows];
  for (int t = 0; t < 2; ++t)
    for (int r = 0; r < rows; ++r) sum[t][r] = accumulate ? V::load(c + r * ldc + 16 * t) : V::set(0.0f);
  for (int s = 0; s < k_steps; ++s, panel += 2 * kTile, x += kSpans * Operand::kQuads * rows, own += kSpans * Operand::kScales * rows)
    in_tiles<V, kSpans, true>([&](auto t, int span) __attribute__((always_inline)) {
      const std::byte* tile = panel + t * kTile;
      if (span == 0)
        for (int row = 0; row < Fmt::scale_rows; ++row) BlockLevels<V, Fmt>::template ask<R>(tile + kRowBytes * row);
      add_span(tile, span, BlockWeights<V, Fmt>::scales(tile, span), x + span * Operand::kQuads * rows,
               own + span * Operand::kScales * rows, sum[t]);
    });
  for (int t = 0; t < 2; ++t)
    for (int r = 0; r < rows; ++r) V::store(c + r * ldc + 16 * t, sum[t][r]);
}

// Without VNNI: 16 k of the levels stay in registers while the rows pass by.
template <class V, class Fmt>
struct BlockRows {
  using F = typename V::F;
  using I = typename V::I;
  using Scales = typename BlockWeights<V, Fmt>::Scales;
  using Levels = BlockLevels<V, Fmt>;
  using Operand = BlockOperand<V, Fmt, true>;
  static constexpr int kMostRows = kMostBlockRows;

  static std::size_t bytes(int m, int padded) { return static_cast<std::size_t>(m) * static_cast<std::size_t>(Operand::row_bytes(padded)); }
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) { Operand::pack(rows, 0, m, k, padded, dst); }
  static void panel(const std::byte* operand, int m, int /*padded*/, const std::byte* panel, int k_steps, float* c, std::ptrdiff_t ldc,
                    bool accumulate) {
    const auto run_rows = m == 1 ? &run<1> : m == 2 ? &run<2> : &run<0>;
    run_rows(panel, k_steps, operand, m, c, ldc, accumulate);
  }

 private:
  // Sums of 16 bits hold 16 k of 4- and 5-bit levels, MXFP4's among them (4 * 2 * 31 * 127 = 31496), and 32 k of 4-bit ones
  // (8 * 2 * 15 * 127 = 30480); of 6-bit levels 8 k (2 * 2 * 63 * 127 = 32004).
  static constexpr bool kNarrow = Levels::kUnsigned && Fmt::bits < 6;
  static constexpr bool kNarrowSpan = kNarrow && Fmt::bits == 4 && !Levels::kFromZero;

  template <int R>
  static void run(const std::byte* panel, int k_steps, const std::byte* operand, int m, float* c, std::ptrdiff_t ldc, bool accumulate) {
    const int rows = R ? R : m;
    walk_blocks<V, Fmt, true, R>(panel, k_steps, operand, rows, c, ldc, accumulate,
                                 [rows](const std::byte* tile, int span, const Scales& scales, const std::uint32_t* x, const float* own,
                                        F* sum) __attribute__((always_inline)) { add_span<R>(tile, span, scales, x, own, rows, sum); });
  }

  template <int R>
  static inline __attribute__((always_inline)) void add_span(const std::byte* tile, int span, const Scales& scales, const std::uint32_t* x,
                                                             const float* own, int rows, F* sum) {
    const auto a = Levels::template pair<0, R>(tile, span), b = Levels::template pair<1, R>(tile, span);
    I first[R ? R : kMostRows];  // sums of k < 16
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) first[r] = products(a, b, x + Operand::kQuads * r);
    const auto c = Levels::template pair<2, R>(tile, span), d = Levels::template pair<3, R>(tile, span);
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      const I second = products(c, d, x + Operand::kQuads * r + 4);
      I whole[2] = {first[r], second};
      if constexpr (kNarrowSpan)
        whole[0] = V::pairs(V::set_i(0), V::add16(first[r], second));
      else if constexpr (kNarrow)
        whole[0] = V::pairs(V::pairs(V::set_i(0), first[r]), second);
      else if constexpr (!Operand::kTwoScales)
        whole[0] = V::add_i(first[r], second);
      sum[r] = add_scaled<V, Fmt>(sum[r], scales, whole, own + Operand::kScales * r);
    }
  }

  // Sums over 16 k, in 16 bits if kNarrow.
  static inline __attribute__((always_inline)) I products(const typename Levels::Pair& a, const typename Levels::Pair& b,
                                                          const std::uint32_t* x) {
    auto word = [&](int i) __attribute__((always_inline)) { return V::set_i(static_cast<std::int32_t>(x[i])); };
    if constexpr (Levels::kUnsigned) {
      const I low = V::add16(V::maddubs(a.first, word(0)), V::maddubs(a.second, word(1)));
      const I high = V::add16(V::maddubs(b.first, word(2)), V::maddubs(b.second, word(3)));
      return kNarrow ? V::add16(low, high) : V::pairs(V::pairs(V::set_i(0), low), high);
    } else {
      const I low = V::pairs(V::pairs(V::set_i(0), V::maddss(a.first, word(0))), V::maddss(a.second, word(1)));
      return V::pairs(V::pairs(low, V::maddss(b.first, word(2))), V::maddss(b.second, word(3)));
    }
  }
};

// With VNNI, which sums four products at once, and its many registers: sums of a group of rows stay in them.
template <class V, class Fmt>
struct BlockVnniDot {
  using F = typename V::F;
  using I = typename V::I;
  using Scales = typename BlockWeights<V, Fmt>::Scales;
  using Levels = BlockLevels<V, Fmt>;
  using Operand = BlockOperand<V, Fmt, false>;
  static constexpr int kGroup = 8;
  static constexpr int kMostRows = kMostBlockRows;

  static int row_bytes(int padded) { return Operand::row_bytes(padded); }
  static void pack_group(RowSource rows, int r0, int n, int k, int padded, std::byte* dst) { Operand::pack(rows, r0, n, k, padded, dst); }

  template <int R>
  static void run(const std::byte* panel, int k_steps, const std::byte* operand, float* c, std::ptrdiff_t ldc, bool accumulate) {
    walk_blocks<V, Fmt, false, R>(panel, k_steps, operand, R, c, ldc, accumulate,
                                  [](const std::byte* tile, int span, const Scales& scales, const std::uint32_t* x, const float* own,
                                     F* sum) __attribute__((always_inline)) { add_span<R>(tile, span, scales, x, own, sum); });
  }

 private:
  template <int R>
  static inline __attribute__((always_inline)) void add_span(const std::byte* tile, int span, const Scales& scales, const std::uint32_t* x,
                                                             const float* own, F* sum) {
    I whole[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      whole[r][0] = V::set_i(Operand::kStart ? reinterpret_cast<const std::int32_t*>(own)[Operand::kScales * r + 1] : 0);
      if (Operand::kTwoScales) whole[r][1] = V::set_i(0);
    }
    products<R, 0>(tile, span, x, whole);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = add_scaled<V, Fmt>(sum[r], scales, whole[r], own + Operand::kScales * r);
  }

  // One pair of quads after another.
  template <int R, int i>
  static inline __attribute__((always_inline)) void products(const std::byte* tile, int span, const std::uint32_t* x, I (&whole)[R][2]) {
    const auto levels = Levels::template pair<i, R>(tile, span);
    const I first = Operand::kUnsigned ? levels.first : Int8Dot<V>::of(levels.first);
    const I second = Operand::kUnsigned ? levels.second : Int8Dot<V>::of(levels.second);
    constexpr int kHalf = Operand::kTwoScales ? i / 2 : 0;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I x_first = V::set_i(static_cast<std::int32_t>(x[2 * i * R + r])),
              x_second = V::set_i(static_cast<std::int32_t>(x[(2 * i + 1) * R + r]));
      whole[r][kHalf] = V::dpbusd(V::dpbusd(whole[r][kHalf], first, x_first), second, x_second);
    }
    if constexpr (i < 3) products<R, i + 1>(tile, span, x, whole);
  }
};
