// Few rows (R) times one panel of int4, unpacked in registers; exact int32 sums. x: int8 quads [k / 4][R].
// Include inside the namespace of a level, after unpack-inl.h and weight_order-inl.h.

// Without VNNI: per block of 16 k, m * sum(q x) - o * sum(x). minus_sum: -sum(x) of each block as a 16-bit number in a word, [k / 16][R].
// 4 * 15 * 127 * 2 < 2^15, so the 16-bit sums of a block are exact.
template <class V, int R>
void mac_int4(const std::byte* panel, int k_steps, const std::uint32_t* x, const std::uint32_t* minus_sum, float* c, std::ptrdiff_t ldc) {
  using I = typename V::I;
  I sum[2][R];
  for (int t = 0; t < 2; ++t)
    for (int r = 0; r < R; ++r) sum[t][r] = V::set_i(0);
  auto pair = [&]<int b>(std::integral_constant<int, b>, const std::byte* tile, const Int4Codes<V>& codes, I(&total)[R])
                  __attribute__((always_inline)) {
                    I part[2][R];
                    for (int j = 0; j < 4; ++j) {
                      const std::byte* at = tile + kRowBytes * (1 + 2 * b + j);
                      ask_ahead<V, Ask::always>(at);
                      const I row = V::load_i(at), q0 = V::and_i(row, 0x0f0f0f0f), q1 = V::and_i(V::template shr<4>(row), 0x0f0f0f0f);
#pragma GCC unroll 2
                      for (int r = 0; r < R; ++r) {
                        const I p0 = V::maddubs(q0, V::set_i(static_cast<std::int32_t>(x[(4 * b + j) * R + r])));
                        const I p1 = V::maddubs(q1, V::set_i(static_cast<std::int32_t>(x[(4 * b + 4 + j) * R + r])));
                        part[0][r] = j ? V::add16(part[0][r], p0) : p0;
                        part[1][r] = j ? V::add16(part[1][r], p1) : p1;
                      }
                    }
#pragma GCC unroll 2
                    for (int r = 0; r < R; ++r) {
                      total[r] = V::madd(V::madd(total[r], part[0][r], codes.template m<b>()), codes.template o<b>(),
                                         V::set_i(static_cast<std::int32_t>(minus_sum[b * R + r])));
                      total[r] = V::madd(V::madd(total[r], part[1][r], codes.template m<b + 1>()), codes.template o<b + 1>(),
                                         V::set_i(static_cast<std::int32_t>(minus_sum[(b + 1) * R + r])));
                    }
                  };
  for (int s = 0; s < k_steps; ++s, x += 16 * R, minus_sum += 4 * R)
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t, panel += Int4Format::rows * kRowBytes) {
      ask_ahead<V, Ask::always>(panel);
      const Int4Codes<V> codes(panel);
      pair(std::integral_constant<int, 0>{}, panel, codes, sum[t]);
      pair(std::integral_constant<int, 2>{}, panel, codes, sum[t]);
    }
  for (int t = 0; t < 2; ++t)
    for (int r = 0; r < R; ++r) V::store_i(c + r * ldc + 16 * t, sum[t][r]);
}

// With VNNI, which sums four products at once: weights become int8 + 128 in registers; what that adds to the sums is the operand's offset.
template <class V, int R>
struct Int4VnniDot {
  using I = typename V::I;
  static constexpr int kTile = Int4Format::rows * kRowBytes;
  static constexpr int kSums = R == 1 ? 2 : 1;  // a single chain of additions would wait for itself

  static void run(const std::byte* panel, int k_steps, const std::uint32_t* x, float* c, std::ptrdiff_t ldc) {
    I sum[2][kSums][R];
#pragma GCC unroll 16
    for (int r = 0; r < 2 * kSums * R; ++r) sum[r / (kSums * R)][r / R % kSums][r % R] = V::set_i(0);
    for (int s = 0; s < k_steps; ++s, x += 16 * R, panel += 2 * kTile) {
#pragma GCC unroll 18
      for (int row = 0; row < 2 * Int4Format::rows; ++row) ask_ahead<V, Ask::always>(panel + kRowBytes * row);  // in the order of memory
      const Int4Codes<V> first(panel), second(panel + kTile);
      add_blocks<0>(first, second, panel, x, sum);
      add_blocks<2>(first, second, panel, x, sum);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V::store_i(c + r * ldc, total(sum[0], r));
      V::store_i(c + r * ldc + 16, total(sum[1], r));
    }
  }

 private:
  static inline __attribute__((always_inline)) I total(const I (&sum)[kSums][R], int r) {
    return kSums == 2 ? V::add_i(sum[0][r], sum[kSums - 1][r]) : sum[0][r];
  }
  // m and o - 128 of blocks b and b + 1, whose levels share bytes.
  template <int b>
  struct Blocks {
    I m[2], o[2];
    explicit Blocks(const Int4Codes<V>& codes)
        : m{codes.template m<b>(), codes.template m<b + 1>()},
          o{codes.template unsigned_offsets<b>(), codes.template unsigned_offsets<b + 1>()} {}
    I low(I row) const { return V::sub8(V::mullo16(V::and_i(row, 0x0f0f0f0f), m[0]), o[0]); }
    I high(I row) const { return V::sub8(V::mullo16(V::and_i(V::template shr<4>(row), 0x0f0f0f0f), m[1]), o[1]); }
  };
  template <int b>
  static inline __attribute__((always_inline)) void add_blocks(const Int4Codes<V>& first, const Int4Codes<V>& second, const std::byte* tile,
                                                               const std::uint32_t* x, I (&sum)[2][kSums][R]) {
    const Blocks<b> block[2] = {Blocks<b>(first), Blocks<b>(second)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const std::byte* at = tile + kRowBytes * (1 + 2 * b + j);
      const I row0 = V::load_i(at), row1 = V::load_i(at + kTile);
      const I low0 = block[0].low(row0), high0 = block[0].high(row0), low1 = block[1].low(row1), high1 = block[1].high(row1);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {  // both tiles share what is loaded of x
        const I x_low = V::set_i(static_cast<std::int32_t>(x[(4 * b + j) * R + r]));
        const I x_high = V::set_i(static_cast<std::int32_t>(x[(4 * b + 4 + j) * R + r]));
        sum[0][0][r] = V::dpbusd(sum[0][0][r], low0, x_low);
        sum[1][0][r] = V::dpbusd(sum[1][0][r], low1, x_low);
        sum[0][kSums - 1][r] = V::dpbusd(sum[0][kSums - 1][r], high0, x_high);
        sum[1][kSums - 1][r] = V::dpbusd(sum[1][kSums - 1][r], high1, x_high);
      }
    }
  }
};
