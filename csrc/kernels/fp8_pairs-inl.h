// Rows times FP8 where pairs of bf16 are multiplied at once: tables make bf16 of codes, and the scales of the columns come in once for
// 128 k, so weights are not rounded. Few rows take the pairs from registers, more from tiles in cache.
//
//   w x = sum over tiles of  (scale * 2^16) * sum((code * 2^-16) x)      every code is a normal bf16 number then, and 128 products of one
//   column stay below the largest x; scales are stored times 2^120
//   operand: groups of rows (each_group<V::kRows>), each [word][row of the group]; words are pairs (k, k + 2) and (k + 1, k + 3) of four k,
//   as the codes of a word come apart
// Include inside the namespace of a level, after mac-inl.h.

// The upper or lower bytes of the bf16 numbers e4m3(code) * 2^-16, for codes without their sign.
struct Fp8Halves {
  std::uint8_t at[128];
  constexpr explicit Fp8Halves(bool upper) : at{} {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, fraction = code & 7;  // (8 + fraction) 2^(exponent - 10), or fraction * 2^-9
      if (exponent == 0 && fraction > 0)
        for (exponent = 1; fraction < 8; fraction *= 2) --exponent;
      const int bits = code == 0 ? 0 : (exponent - 7 - 16 + 127) << 7 | (fraction & 7) << 4;
      at[code] = static_cast<std::uint8_t>(upper ? bits >> 8 : bits & 255);
    }
  }
};
inline constexpr Fp8Halves kFp8Upper(true), kFp8Lower(false);

// A row of tile, 4 consecutive k of 16 columns, as bf16 pairs (k, k + 2) and (k + 1, k + 3) of e4m3(code) * 2^-16.
template <class V>
struct Fp8Codes {
  using I = typename V::I;
  I even, odd;
  explicit inline __attribute__((always_inline)) Fp8Codes(const std::byte* at) {
    ask_ahead<V, Ask::always>(at);
    const I codes = V::load_i(at);
    const I lower = V::lookup_bytes128(codes, kFp8Lower.at);
    const I upper = V::or_i(V::lookup_bytes128(codes, kFp8Upper.at), V::and_i(codes, static_cast<std::int32_t>(0x80808080u)));
    even = V::or_i(V::template shl16<8>(upper), V::and_i(lower, 0x00ff00ff));
    odd = V::or_i(V::and_i(upper, static_cast<std::int32_t>(0xff00ff00u)), V::template shr16<8>(lower));
  }
};

// What sums of 128 k over Fp8Codes still have to be multiplied by, and how they get there.
template <class V>
struct Fp8Scale {
  using F = typename V::F;
  F scale;
  explicit Fp8Scale(const std::byte* tile) : scale(V::mul(V::load(reinterpret_cast<const float*>(tile)), V::set(0x1p-104f))) {}
  void add(F sum, float* c, bool accumulate) const { V::store(c, accumulate ? V::fma(scale, sum, V::load(c)) : V::mul(scale, sum)); }
};

template <class V>
struct Fp8Pairs {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kMostRows = kMostBlockRows;  // more than kFewRows through tiles in cache
  static constexpr int kFewRows = 2 * V::kRows;
  static constexpr int kTile = Fp8Format::rows * kRowBytes, kCodeRows = Fp8Format::rows - Fp8Format::scale_rows;
  static constexpr int kStepWords = Fp8Format::k_step / 2;

  static std::size_t bytes(int m, int padded) { return static_cast<std::size_t>(m) * static_cast<std::size_t>(padded) * 2; }
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) {
    interleave_groups<V>(m, padded / 2, dst, [&](int r, int i) { return V::cross_pairs(load_pairs<V>(rows.row<bf16>(r), 32 * i, k)); });
  }

  // All rows times one panel.
  static void panel(const std::byte* operand, int m, int /*padded*/, const std::byte* panel, int k_steps, float* c, std::ptrdiff_t ldc,
                    bool accumulate) {
    const auto* x = reinterpret_cast<const std::uint32_t*>(operand);
    if (m <= kFewRows)
      each_group<V::kRows>(m, [&](int r, int n) {
        const auto run_rows = for_rows<V::kRows>(n, [](auto rows) { return &run<rows>; });
        run_rows(panel, k_steps, x + static_cast<std::ptrdiff_t>(r) * k_steps * kStepWords, c + r * ldc, ldc, accumulate);
      });
    else
      run_in_cache(panel, k_steps, x, m, c, ldc, accumulate);
  }

 private:
  template <int R>
  static void run(const std::byte* panel, int k_steps, const std::uint32_t* x, float* c, std::ptrdiff_t ldc, bool accumulate) {
    for (int s = 0; s < k_steps; ++s, x += kStepWords * R)
      for (int t = 0; t < 2; ++t, panel += kTile) {
        F sum[kSums<R>][R];
        for (int i = 0; i < kSums<R>; ++i)
          for (int r = 0; r < R; ++r) sum[i][r] = V::set(0.0f);
        ask_ahead<V, Ask::always>(panel);
        for (int pair = 0; pair < kCodeRows / 2; ++pair) {
          const std::byte* row = panel + (Fp8Format::scale_rows + 2 * pair) * kRowBytes;
          add_codes<R, 0>(row, x + 4 * pair * R, sum);
          add_codes<R, 2>(row + kRowBytes, x + (4 * pair + 2) * R, sum);
        }
        const Fp8Scale<V> scale(panel);
        for (int r = 0; r < R; ++r) scale.add(total<kSums<R>, R>(sum, r), c + r * ldc + 16 * t, s > 0 || accumulate);
      }
  }

  static void run_in_cache(const std::byte* panel, int k_steps, const std::uint32_t* x, int m, float* c, std::ptrdiff_t ldc,
                           bool accumulate) {
    constexpr int kSteps = kStepWords / 16;
    alignas(64) std::byte tiles[2][kSteps * kTileBytes];
    alignas(64) float sums[kMostRows * kPanelColumns];
    for (int s = 0; s < k_steps; ++s, panel += 2 * kTile) {
      for (int t = 0; t < 2; ++t)
        for (int row = 0; row < kCodeRows; ++row) {
          const Fp8Codes<V> pairs(panel + t * kTile + (Fp8Format::scale_rows + row) * kRowBytes);
          V::store_i(tiles[t] + 2 * row * kRowBytes, pairs.even);
          V::store_i(tiles[t] + (2 * row + 1) * kRowBytes, pairs.odd);
        }
      using Dot = InCache<Bf16PairDot<V>>;
      const AskInTurns ask(panel + 2 * kTile + V::kAhead, 2 * kTile, 0, 1, mac_turns<V, Dot>(2, kSteps, m));  // beyond Fp8Codes
      mac_rows<V, Dot>(tiles[0], kTileBytes, sizeof tiles[0], 2, kSteps * s, kSteps, x, static_cast<std::size_t>(k_steps) * kStepWords, m,
                       sums, kPanelColumns, false, ask);
      const Fp8Scale<V> scale[2] = {Fp8Scale<V>(panel), Fp8Scale<V>(panel + kTile)};
      for (int r = 0; r < m; ++r)
        for (int t = 0; t < 2; ++t) scale[t].add(V::load(sums + r * kPanelColumns + 16 * t), c + r * ldc + 16 * t, s > 0 || accumulate);
    }
  }

  // Of a row: a single chain of additions would wait for itself, unless there are many beside it. More than 10 rows need the registers.
  template <int R>
  static constexpr int kSums = R == 1 ? 4 : 1 + (R <= 10);

  template <int n, int R>
  static F total(const F (&sum)[n][R], int r) {
    if constexpr (n == 4)
      return V::add(V::add(sum[0][r], sum[1][r]), V::add(sum[2][r], sum[3][r]));
    else
      return n == 2 ? V::add(sum[0][r], sum[n - 1][r]) : sum[0][r];
  }
  // first: of the two sums that a row of tile goes to.
  template <int R, int first, int n>
  static inline __attribute__((always_inline)) void add_codes(const std::byte* at, const std::uint32_t* x, F (&sum)[n][R]) {
    const Fp8Codes<V> pairs(at);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      F &a = sum[first % n][r], &b = sum[(first + 1) % n][r];
      a = V::dpbf16(a, pairs.even, V::set_i(static_cast<std::int32_t>(x[r])));
      b = V::dpbf16(b, pairs.odd, V::set_i(static_cast<std::int32_t>(x[R + r])));
    }
  }
};
