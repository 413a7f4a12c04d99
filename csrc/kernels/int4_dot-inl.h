// Rows of int8 times one panel of int4, unpacked in registers; exact int32 sums.
// Include inside the namespace of a level, after unpack-inl.h and weight_order-inl.h.

// Per block of 16 k, m * sum(q x) - o * sum(x). A block stays in registers while all rows pass by. Blocks come in pairs,
// whose levels share bytes, and whose offsets one multiplication takes.
//   x    for each pair: quads of the first block [row][4], of the second, and a word [row] of two 16-bit numbers, -sum(x) of each
// The sums of a block are exact in 16 bits: 16 * 15 * 127 < 2^15.
template <class V>
struct Int4Blocks {
  using I = typename V::I;
  static constexpr int kPairWords = 9;  // words of a row for 32 k

  static void pack(RowSource rows, int m, int padded, std::uint32_t* x) {
    for (int k = 0; k < padded; k += Int4Format::k_step)
      for (int r = 0; r < m; ++r) {
        const std::int8_t* row = rows.row<std::int8_t>(r) + k;
        alignas(64) std::int32_t quads[16];  // their sums
        V::store_i(quads, V::pairs(V::set_i(0), V::maddubs(V::set_i(0x01010101), V::load_i(row))));
        for (int pair = 0; pair < 2; ++pair, row += 32) {
          std::uint32_t* to = x + (k / 32 + pair) * kPairWords * m;
          std::memcpy(to + 4 * r, row, 16);
          std::memcpy(to + 4 * (m + r), row + 16, 16);
          to[8 * m + r] = minus_sum(quads + 8 * pair) | minus_sum(quads + 8 * pair + 4) << 16;
        }
      }
  }

  template <int kMostRows>
  static void panel(const std::byte* panel, int k_steps, const std::uint32_t* x, int m, float* c, std::ptrdiff_t ldc) {
    constexpr int kTwo = V::kTiles == 2 ? 2 : 0;  // with fewer registers a known number of rows above one gains nothing
    const auto run_rows = m == 1 ? &run<1, kMostRows> : m == 2 ? &run<kTwo, kMostRows> : &run<0, kMostRows>;
    run_rows(panel, k_steps, x, m, c, ldc);
  }

 private:
  // R = m, whose sums then stay in registers, or 0 for any m <= kMostRows.
  template <int R, int kMostRows>
  static void run(const std::byte* panel, int k_steps, const std::uint32_t* x, int m, float* c, std::ptrdiff_t ldc) {
    I sum[2][R ? R : kMostRows];
    const int rows = R ? R : m;
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < rows; ++r) sum[t][r] = V::set_i(0);
    for (int s = 0; s < k_steps; ++s, x += 2 * kPairWords * rows)
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t, panel += Int4Format::rows * kRowBytes) {
        ask_ahead<V, kAsk<R>>(panel);
        const Int4Codes<V> codes(panel);
        add_pair<R, 0>(panel, codes, x, rows, sum[t]);
        add_pair<R, 2>(panel, codes, x + kPairWords * rows, rows, sum[t]);
      }
    for (int t = 0; t < 2; ++t)
      for (int r = 0; r < rows; ++r) V::store_i(c + r * ldc + 16 * t, sum[t][r]);
  }

  static std::uint32_t minus_sum(const std::int32_t* quads) {
    return static_cast<std::uint16_t>(-(quads[0] + quads[1] + quads[2] + quads[3]));
  }

  template <int R>
  static constexpr Ask kAsk = R && R < V::kAskRows ? Ask::unpacked : Ask::always;

  // Blocks b and b + 1 of a tile.
  template <int R, int b>
  static inline __attribute__((always_inline)) void add_pair(const std::byte* tile, const Int4Codes<V>& codes, const std::uint32_t* x,
                                                             int rows, I* sum) {
    I q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const std::byte* at = tile + kRowBytes * (1 + 2 * b + j);
      ask_ahead<V, kAsk<R>>(at);
      q[j] = V::and_i(V::load_i(at), 0x0f0f0f0f);
    }
    const I m0 = factor(codes.template m<b>());
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) sum[r] = V::madd(sum[r], products(q, x + 4 * r), m0);

#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) q[j] = V::and_i(V::template shr<4>(V::load_i(tile + kRowBytes * (1 + 2 * b + j))), 0x0f0f0f0f);
    const I m1 = factor(codes.template m<b + 1>());
    const I o = codes.template o_pair<b>();
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      const I offsets = V::set_i(static_cast<std::int32_t>(x[8 * rows + r]));
      sum[r] = V::madd(V::madd(sum[r], o, offsets), products(q, x + 4 * (rows + r)), m1);
    }
  }

  // Sums of q x over a block: of its even and odd k in the halves of a word, or of all k in the word.
  static inline __attribute__((always_inline)) I products(const I (&q)[4], const std::uint32_t* x) {
    auto word = [&](int j) __attribute__((always_inline)) { return V::set_i(static_cast<std::int32_t>(x[j])); };
    if constexpr (V::kVnni) {
      return V::dpbusd(V::dpbusd(V::dpbusd(V::dpbusd(V::set_i(0), q[0], word(0)), q[1], word(1)), q[2], word(2)), q[3], word(3));
    } else {
      auto product = [&](int j) __attribute__((always_inline)) { return V::maddubs(q[j], word(j)); };
      return V::add16(V::add16(product(0), product(1)), V::add16(product(2), product(3)));
    }
  }
  // m, which is in both halves of a word, for what they hold; the upper half of a sum in a word is only its sign.
  static inline __attribute__((always_inline)) I factor(I m) { return V::kVnni ? V::and_i(m, 0xffff) : m; }
};

// With VNNI and the registers for both tiles: weights become int8 + 128 in registers; what that adds to the sums is the operand's offset.
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
    explicit Blocks(const Int4Codes<V>& codes) : m{codes.template m<b>(), codes.template m<b + 1>()} { codes.template o_bytes<b, true>(o); }
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
