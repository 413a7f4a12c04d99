// Few rows times a block format in integers: activations are int8 with one scale per 32 k, levels are bytes, sums are exact.
//
//   w x ~ sum over spans of  x_scale * (scale * sum(q x8) - shift * sum(x8))        scale and shift of BlockWeights
//   operand of a group of R rows: x8 [k / 4][R], words in the order in which the levels leave theirs (signed levels: as Signed has
//   them); then kSpanScales per span and row: x_scale, and for unsigned levels x_scale * sum(x8), of each 16 k apart where these have a
//   scale of their own; for signed levels that VNNI takes as unsigned ones what their integer sum starts from
// Include inside the namespace of a level, after unpack-inl.h, dot-inl.h, weight_order-inl.h and row_groups-inl.h.

template <class V, class Fmt>
struct BlockDot {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kGroup = V::kRows > 8 ? 8 : 4;
  static constexpr int kMostRows = 16;  // more rows pay for unpacking the weights, and their activations stay exact
  static constexpr bool kFromZero = requires { Fmt::zero; };
  static constexpr bool kUnsigned = Fmt::bits < 8 && (kFromZero || !HasLevels<Fmt>);  // levels 0 .. 63 that maddubs takes
  using Signed = Int8Dot<V>;
  static constexpr int kSpanWords = 8;
  static constexpr bool kTwoScales = Fmt::bits == 6;                      // one for each 16 k
  static constexpr bool kStart = !kUnsigned && Signed::unsigned_weights;  // integer sums start from -128 sum(x8)
  static constexpr int kSpanScales = kTwoScales ? 3 : kUnsigned || kStart ? 2 : 1;
  static constexpr bool kPairSums = kUnsigned && !V::kVnni && !kTwoScales;                    // 16-bit sums, which `pairs` adds up
  static constexpr bool kHalves = kTwoScales || (kPairSums && (Fmt::bits > 4 || kFromZero));  // sums of 16 k apart
  static constexpr int kSpanRows = Fmt::bits == 8 ? 8 : 4;                                    // 64-byte rows of levels in a span

  static int row_bytes(int padded) { return padded / 32 * (kSpanWords + kSpanScales) * 4; }

  // A span with a number that is not finite gets scale NaN.
  static void pack_group(RowSource rows, int r0, int n, int k, int padded, std::byte* dst) {
    auto* words = reinterpret_cast<std::uint32_t*>(dst);
    auto* scales = reinterpret_cast<float*>(words + padded / 32 * kSpanWords * n);
    for (int j = 0; j < padded; j += 32, words += kSpanWords * n, scales += kSpanScales * n)
      for (int r = 0; r < n; ++r) {
        const bf16* row = rows.row<bf16>(r0 + r);
        const F first = load_row<V>(row, j, k), second = load_row<V>(row, j + 16, k);
        const F poison = V::add(V::mul(first, V::set(0.0f)), V::mul(second, V::set(0.0f)));
        const float scale = V::hmax(V::max(V::abs(first), V::abs(second))) / 127.0f;
        const float inverse = scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f;
        alignas(64) std::int8_t x[32];
        V::store_s8(x, V::to_i(V::mul(first, V::set(inverse))));
        V::store_s8(x + 16, V::to_i(V::mul(second, V::set(inverse))));
        int sum[2] = {};
        for (int i = 0; i < 32; ++i) sum[i / 16] += x[i];
        pack_span(x, n, words + r);
        float* own = scales + kSpanScales * r;
        own[0] = V::hsum(poison) == 0.0f ? scale : std::numeric_limits<float>::quiet_NaN();
        if (kTwoScales)
          for (int i = 0; i < 2; ++i) own[1 + i] = own[0] * static_cast<float>(sum[i]);
        else if (kUnsigned)
          own[1] = own[0] * static_cast<float>(sum[0] + sum[1]);
        else if (kStart)
          reinterpret_cast<std::int32_t*>(own)[1] = -128 * (sum[0] + sum[1]);
      }
  }

  template <int R>
  static void run(const std::byte* panel, int k_steps, const std::byte* operand, float* c, std::ptrdiff_t ldc, bool accumulate) {
    constexpr int kSpans = Fmt::k_step / 32, kTile = Fmt::rows * kRowBytes;
    const auto* x = reinterpret_cast<const std::uint32_t*>(operand);
    const auto* x_scales = reinterpret_cast<const float*>(x + k_steps * kSpans * kSpanWords * R);
    F sum[2][R];
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < R; ++r) sum[t][r] = accumulate ? V::load(c + r * ldc + 16 * t) : V::set(0.0f);
    for (int s = 0; s < k_steps; ++s, panel += 2 * kTile, x += kSpans * kSpanWords * R, x_scales += kSpans * kSpanScales * R)
      in_tiles<V, kSpans, true>([&](auto t, int span) __attribute__((always_inline)) {
        add_span<R>(panel + t * kTile, span, x + span * kSpanWords * R, x_scales + span * kSpanScales * R, sum[t]);
      });
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < R; ++r) V::store(c + r * ldc + 16 * t, sum[t][r]);
  }

 private:
  template <int R>
  static constexpr Ask kAsk = Fmt::bits != 8 || R >= V::kAskRows ? Ask::always : Ask::in_halves;
  // The large tiles of K-quants: one or two rows are faster with less ahead.
  template <int R>
  static constexpr int kDistance = Fmt::k_step == 256 && R <= 2 ? V::kAhead / 2 : V::kAhead;

  // One byte order for both kinds of words: nibble words give even k, then odd k; byte words give four consecutive k.
  static void pack_span(const std::int8_t* x, int rows, std::uint32_t* words) {
    for (int q = 0; q < 8; ++q) {
      std::int8_t quad[4];
      for (int b = 0; b < 4; ++b) quad[b] = Fmt::bits == 8 ? x[4 * q + b] : x[8 * (q / 2) + 2 * b + q % 2];
      std::memcpy(words + q * rows, quad, 4);
    }
  }

  template <int R>
  static inline __attribute__((always_inline)) void add_span(const std::byte* tile, int span, const std::uint32_t* x, const float* x_scales,
                                                             F (&sum)[R]) {
    if (span == 0)
      for (int row = 0; row < Fmt::scale_rows; ++row) ask_ahead<V, kAsk<R>, kDistance<R>>(tile + kRowBytes * row);
    const auto scales = BlockWeights<V, Fmt>::scales(tile, span);
    I half[2][R];  // sums of k < 16 and k >= 16, where they are apart; else all in the first
    I part[R];     // 16-bit sums if kPairSums, else 32-bit ones
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r] = V::set_i(kStart ? reinterpret_cast<const std::int32_t*>(x_scales)[kSpanScales * r + 1] : 0);
    products<R, 0>(tile, span, x, half, part);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F x_scale = V::set(x_scales[kSpanScales * r]);
      auto x_sum = [&](int i) { return V::set(x_scales[kSpanScales * r + i]); };
      const I whole = kHalves && kPairSums ? V::add_i(half[0][r], half[1][r]) : half[0][r];
      sum[r] = V::fma(V::mul(scales.scale[0], x_scale), V::to_f(whole), sum[r]);
      if constexpr (kTwoScales) {
        sum[r] = V::fma(V::mul(scales.scale[1], x_scale), V::to_f(half[1][r]), sum[r]);
        sum[r] = V::fma(V::mul(scales.scale[0], V::set(-32.0f)), x_sum(1), sum[r]);
        sum[r] = V::fma(V::mul(scales.scale[1], V::set(-32.0f)), x_sum(2), sum[r]);
      } else if constexpr (kUnsigned) {
        sum[r] = V::fma(V::sub(V::set(0.0f), scales.shift), x_sum(1), sum[r]);
      }
    }
  }

  // One row of levels after another.
  template <int R, int row>
  static inline __attribute__((always_inline)) void products(const std::byte* tile, int span, const std::uint32_t* x, I (&half)[2][R],
                                                             I (&part)[R]) {
    if constexpr (row < kSpanRows) {
      const std::byte* at = tile + kRowBytes * (Fmt::scale_rows + span * kSpanRows + row);
      ask_ahead<V, kAsk<R>, kDistance<R>>(at);
      const I word = V::load_i(at);
      if constexpr (Fmt::bits == 8) {
        signed_products<R>(word, x + row * R, part);
      } else {
        const I low = V::and_i(word, 0x0f0f0f0f), high = V::and_i(V::template shr<4>(word), 0x0f0f0f0f);
        constexpr bool kFirst = row == 0 || (kHalves && row == 2);
        if constexpr (kFromZero) {
          unsigned_products<R, kFirst, row>(tile, span, V::lookup_bytes(low, kLevelsFromZero<Fmt>.at),
                                            V::lookup_bytes(high, kLevelsFromZero<Fmt>.at), x + 2 * row * R, part);
        } else if constexpr (HasLevels<Fmt>) {
          signed_products<R>(V::lookup_bytes(low, Fmt::levels), x + 2 * row * R, part);
          signed_products<R>(V::lookup_bytes(high, Fmt::levels), x + (2 * row + 1) * R, part);
        } else {
          unsigned_products<R, kFirst, row>(tile, span, low, high, x + 2 * row * R, part);
        }
      }
      if constexpr (kHalves && row % 2 == 1) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) half[row / 2][r] = whole_sums(part[r]);
      }
      products<R, row + 1>(tile, span, x, half, part);
    } else if constexpr (!kHalves) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) half[0][r] = whole_sums(part[r]);
    }
  }

  static inline __attribute__((always_inline)) I whole_sums(I part) { return kPairSums ? V::pairs(V::set_i(0), part) : part; }

  template <int R>
  static inline __attribute__((always_inline)) void signed_products(I levels, const std::uint32_t* x, I (&part)[R]) {
    const I w = Signed::of(levels);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r] = Signed::mac(part[r], w, x + r);
  }

  // VNNI sums in 32 bits. In 16 bits: 4-bit levels over the span (8 products of pairs, 8 * 2 * 15 * 127 = 30480), 5-bit levels, MXFP4's
  // among them, over 16 k (4 * 2 * 31 * 127 = 31496). 6-bit levels over one row (2 * 2 * 63 * 127 = 32004), then in 32 bits.
  template <int R, bool kFirst, int row>
  static inline __attribute__((always_inline)) void unsigned_products(const std::byte* tile, int span, I low, I high,
                                                                      const std::uint32_t* x, I (&part)[R]) {
    if constexpr (Fmt::bits == 5) {
      const std::byte* at = tile + kRowBytes * (Fmt::high_row + span);
      if constexpr (row == 0) ask_ahead<V, kAsk<R>, kDistance<R>>(at);
      const I bits = V::load_i(at);
      low = V::or_i(low, V::and_i(move_bit<V, 2 * row, 4>(bits), 0x10101010));
      high = V::or_i(high, V::and_i(move_bit<V, 2 * row + 1, 4>(bits), 0x10101010));
    } else if constexpr (Fmt::bits == 6) {
      const std::byte* at = tile + kRowBytes * (Fmt::high_row + 2 * span + row / 2);
      if constexpr (row % 2 == 0) ask_ahead<V, kAsk<R>, kDistance<R>>(at);
      const I bits = V::load_i(at);
      low = V::or_i(low, V::and_i(move_bit<V, 4 * (row % 2), 4>(bits), 0x30303030));
      high = V::or_i(high, V::and_i(move_bit<V, 4 * (row % 2) + 2, 4>(bits), 0x30303030));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I x_low = V::set_i(static_cast<std::int32_t>(x[r])), x_high = V::set_i(static_cast<std::int32_t>(x[R + r]));
      if constexpr (V::kVnni) {
        part[r] = V::dpbusd(V::dpbusd(kFirst ? V::set_i(0) : part[r], low, x_low), high, x_high);
      } else {
        const I both = V::add16(V::maddubs(low, x_low), V::maddubs(high, x_high));
        if constexpr (kPairSums)
          part[r] = kFirst ? both : V::add16(part[r], both);
        else
          part[r] = V::pairs(kFirst ? V::set_i(0) : part[r], both);
      }
    }
  }
};
