// Few rows times one panel of a block format, unpacked in registers, for levels without integer products of bytes. Operand: fp32 [k][row].
// Include inside the namespace of a level, after unpack-inl.h and products-inl.h.

template <class V, class Fmt>
struct PlainBlocks {
  using F = typename V::F;
  static constexpr int kMostRows = 2;

  static std::size_t bytes(int m, int padded) { return static_cast<std::size_t>(m) * static_cast<std::size_t>(padded) * 4; }
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) { Fp32Products<V>::pack(rows, m, k, padded, dst); }
  static void panel(const std::byte* operand, int m, int /*padded*/, const std::byte* panel, int k_steps, float* c, std::ptrdiff_t ldc,
                    bool accumulate) {
    (m == 1 ? run<1> : run<2>)(panel, k_steps, reinterpret_cast<const float*>(operand), c, ldc, accumulate);
  }

 private:
  template <int R>
  static void run(const std::byte* panel, int k_steps, const float* x, float* c, std::ptrdiff_t ldc, bool accumulate) {
    constexpr int kSums = R == 1 ? 2 : 1;  // even and odd k apart: a single chain of additions would wait for itself
    F sum[2][kSums][R];
    for (int t = 0; t < 2; ++t)
      for (int i = 0; i < kSums; ++i)
        for (int r = 0; r < R; ++r) sum[t][i][r] = V::set(0.0f);
    for (int s = 0; s < k_steps; ++s, panel += 2 * Fmt::rows * kRowBytes)
      for (int span = 0; span < Fmt::k_step / 32; ++span, x += 32 * R)
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t)
          BlockWeights<V, Fmt>::each(panel + t * Fmt::rows * kRowBytes, span, [&](int k, F w) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[t][k % kSums][r] = V::fma(w, V::set(x[k * R + r]), sum[t][k % kSums][r]);
          });
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < R; ++r) {
        float* at = c + r * ldc + 16 * t;
        const F total = kSums == 2 ? V::add(sum[t][0][r], sum[t][kSums - 1][r]) : sum[t][0][r];
        V::store(at, accumulate ? V::add(V::load(at), total) : total);
      }
  }
};
