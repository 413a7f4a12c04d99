// Few rows times FP8: shifts alone make floats of codes, and the scales of the columns come in once for 128 k.
//
//   w x = sum over tiles of  (scale * 2^120) * sum((code * 2^-120) x)        a code moved into a float is its value times 2^-120
//   x goes times the power of two that brings the largest of its row to 2^60: so products stay normal numbers, and nothing is rounded.
//   operand of a group of R rows: x [k][R] in fp32, then the R powers of two that take this back
// Include inside the namespace of a level, after weight_order-inl.h and row_groups-inl.h.

template <class V>
struct Fp8Dot {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kGroup = 4, kMostRows = 12;  // more rows pay for unpacking the weights

  static std::size_t bytes(int m, int padded) { return static_cast<std::size_t>(m) * static_cast<std::size_t>(row_bytes(padded)); }

  // m rows of bf16, k columns, padded to `padded`.
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) {
    each_group<kGroup>(m, [&](int r, int n) { pack_group(rows, r, n, k, padded, dst + r * row_bytes(padded)); });
  }

  // All rows of an operand times one panel.
  static void panel(const std::byte* operand, int m, int padded, const std::byte* panel, int k_steps, float* c, std::ptrdiff_t ldc,
                    bool accumulate) {
    each_group<kGroup>(m, [&](int r, int n) {
      const auto run_rows = for_rows<kGroup>(n, [](auto rows) { return &run<rows>; });
      run_rows(panel, k_steps, operand + r * row_bytes(padded), c + r * ldc, ldc, accumulate);
    });
  }

 private:
  static int row_bytes(int padded) { return 4 * (padded + 1); }

  static void pack_group(RowSource rows, int r0, int n, int k, int padded, std::byte* dst) {
    auto* x = reinterpret_cast<float*>(dst);
    for (int r = 0; r < n; ++r) {
      const bf16* row = rows.row<bf16>(r0 + r);
      F most = V::set(0.0f);
      for (int j = 0; j < padded; j += 16) most = V::max(most, V::abs(load_row<V>(row, j, k)));
      const float largest = V::hmax(most);
      const int up = largest > 0.0f && std::isfinite(largest) ? std::min(60 - std::ilogb(largest), 126) : 0;
      for (int j = 0; j < padded; j += 16) {
        alignas(64) float values[16];
        V::store(values, V::mul(load_row<V>(row, j, k), V::set(std::ldexp(1.0f, up))));
        for (int i = 0; i < 16; ++i) x[(j + i) * n + r] = values[i];
      }
      x[padded * n + r] = std::ldexp(1.0f, -up);
    }
  }

  template <int R>
  static void run(const std::byte* panel, int k_steps, const std::byte* operand, float* c, std::ptrdiff_t ldc, bool accumulate) {
    constexpr int kTile = Fp8Format::rows * kRowBytes, kCodeRows = Fp8Format::rows - Fp8Format::scale_rows;
    constexpr int kSums = R == 1 ? 2 : 1;  // even and odd k apart: a single chain of additions would wait for itself
    const auto* x = reinterpret_cast<const float*>(operand);
    F total[2][R];
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < R; ++r) total[t][r] = V::set(0.0f);
    for (int s = 0; s < k_steps; ++s, panel += 2 * kTile, x += Fp8Format::k_step * R) {
      F sum[2][kSums][R];
      ask_ahead<V, Ask::always>(panel);
      ask_ahead<V, Ask::always>(panel + kTile);
      for (int t = 0; t < 2; ++t)
        for (int i = 0; i < kSums; ++i)
          for (int r = 0; r < R; ++r) sum[t][i][r] = V::set(0.0f);
      in_tiles<V, kCodeRows, true>([&](auto t, int row) __attribute__((always_inline)) {
        add_codes<R, kSums>(panel + t * kTile + (Fp8Format::scale_rows + row) * kRowBytes, x + 4 * row * R, sum[t]);
      });
      for (int t = 0; t < 2; ++t)
        for (int r = 0; r < R; ++r) {
          const F all = kSums == 2 ? V::add(sum[t][0][r], sum[t][kSums - 1][r]) : sum[t][0][r];
          total[t][r] = V::fma(V::load(reinterpret_cast<const float*>(panel + t * kTile)), all, total[t][r]);
        }
    }
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < R; ++r) {
        float* at = c + r * ldc + 16 * t;
        const F y = V::mul(total[t][r], V::set(x[r]));
        V::store(at, accumulate ? V::add(V::load(at), y) : y);
      }
  }

  // A row of tile: 4 consecutive k of 16 columns.
  template <int R, int kSums>
  static inline __attribute__((always_inline)) void add_codes(const std::byte* at, const float* x, F (&sum)[kSums][R]) {
    ask_ahead<V, Ask::always>(at);
    constexpr auto kBits = static_cast<std::int32_t>(0x87f087f0u), kHigh = static_cast<std::int32_t>(0xffff0000u);
    const I codes = V::load_i(at);
    const I odd = V::and_i(V::template sar16<4>(codes), kBits), even = V::and_i(V::template sar16<4>(V::template shl<8>(codes)), kBits);
    const F w[4] = {V::as_f(V::template shl<16>(even)), V::as_f(V::template shl<16>(odd)), V::as_f(V::and_i(even, kHigh)),
                    V::as_f(V::and_i(odd, kHigh))};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[k % kSums][r] = V::fma(w[k], V::set(x[k * R + r]), sum[k % kSums][r]);
  }
};
