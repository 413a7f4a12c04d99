// How vector GEMMs multiply numbers that are not int8: as fp32, or as pairs of bf16 where one instruction does both (V::kBf16Pairs).
// Each kind says what the words of its operands and the rows of its expanded weights hold:
//   kPerWord      numbers that a word contracts over: 1 or 2
//   Stored        the Dot for bf16 tiles as they lie in memory
//   Cached        the Dot for what `expand` and `outer_rows` make
//   pack, pack_grad, pack_outer   operands: each_group<V::kRows> of rows (pack_outer: columns), each [word][row of the group]
//   expand        the two tiles of a k-step, transposed, for the way back
//   outer_rows    the rows of Q
// Include inside the namespace of a level, after dot-inl.h and row_groups-inl.h.

// 16 words of each of n <= 16 rows (64 bytes apart at x, all 16 readable) -> [word][row]; returns the end.
template <class V>
inline std::uint32_t* interleave(const void* x, int n, std::uint32_t* dst) {
  alignas(64) std::uint32_t t[16][16];
  V::transpose16(x, 64, t);
  int i = 0;
  for (; i * n + 16 <= 16 * n; ++i) V::store_i(dst + i * n, V::load_i(t[i]));  // the next one overwrites what is too much
  for (; i < 16; ++i) std::memcpy(dst + i * n, t[i], 4 * static_cast<std::size_t>(n));
  return dst + 16 * n;
}

// Groups of rows (each_group<V::kRows>), 16 words at a time: load(row, i) gives words 16i .. 16i + 15.
template <class V, class Load>
inline void interleave_groups(int m, int words, std::byte* dst, Load load) {
  auto* out = reinterpret_cast<std::uint32_t*>(dst);
  alignas(64) std::byte x[16 * 64] = {};
  each_group<V::kRows>(m, [&](int r0, int n) {
    for (int i = 0; i < words / 16; ++i) {
      for (int r = 0; r < n; ++r) V::store_i(x + 64 * r, load(r0 + r, i));
      out = interleave<V>(x, n, out);
    }
  });
}

// 16 columns of a row of dY from column j, each times its scale if there is one.
template <class V>
inline typename V::F load_grad(const bf16* row, const float* column_scale, int j, int columns) {
  const typename V::F x = load_row<V>(row, j, columns);
  return column_scale ? V::mul(x, V::load(column_scale + j)) : x;
}

// 32 numbers of a row from column j, in pairs; columns at or beyond `columns` are zero and are not read.
template <class V>
inline typename V::I load_pairs(const bf16* row, int j, int columns) {
  if (j + 32 <= columns) return V::load_i(row + j);
  alignas(64) bf16 tail[32] = {};
  if (j < columns) std::memcpy(tail, row + j, 2 * static_cast<std::size_t>(columns - j));
  return V::load_i(tail);
}

template <class V>
struct Fp32Products {
  static constexpr int kPerWord = 1;
  using Stored = Bf16Dot<V>;
  using Cached = F32Dot<V>;

  static void pack(RowSource rows, int m, int columns, int padded, std::byte* dst) { pack_grad(rows, nullptr, m, columns, padded, dst); }
  static void pack_grad(RowSource dy, const float* column_scale, int m, int columns, int padded, std::byte* dst) {
    interleave_groups<V>(m, padded, dst,
                         [&](int r, int i) { return V::as_i(load_grad<V>(dy.row<bf16>(r), column_scale, 16 * i, columns)); });
  }
  // [row of P][column of the group], rows padded to 16 with zeros.
  static void pack_outer(const bf16* p, std::ptrdiff_t ld, int m, int p_columns, std::byte* dst) {
    auto* out = reinterpret_cast<float*>(dst);
    each_group<V::kRows>(p_columns, [&](int i0, int n) {
      for (int t = 0; t < round_up(m, 16); ++t)
        for (int i = 0; i < n; ++i) *out++ = t < m ? to_float(p[t * ld + i0 + i]) : 0.0f;
    });
  }

  // Tiles a and b of a k-step -> [tile][word part i][n][16 floats]: k = kWords * j + i.
  template <int kWords>
  static void expand(const std::byte* a, const std::byte* b, std::byte* dst) {
    alignas(64) std::byte rows[2 * kTileBytes];  // of constant n, word j = word j of the tile
    V::transpose16(a, 64, rows);
    V::transpose16(b, 64, rows + kTileBytes);
    for (int t = 0; t < 2; ++t) expand_rows<kWords>(rows + t * kTileBytes, dst + t * kWords * kTileBytes);
  }

  static void outer_rows(RowSource q, int m, std::ptrdiff_t column, std::byte* dst) {
    for (int r = 0; r < round_up(m, 16); ++r)
      V::store(reinterpret_cast<float*>(dst + 64 * r), r < m ? V::load_bf16(q.row<bf16>(r) + column) : V::set(0.0f));
  }

 private:
  template <int kWords>
  static void expand_rows(const std::byte* rows, std::byte* dst) {
    constexpr int kPlane = kTileBytes / 4;
    for (int n = 0; n < 16; ++n) {
      const auto word = V::load_i(rows + 64 * n);
      auto* out = reinterpret_cast<float*>(dst + 64 * n);
      if constexpr (kWords == 2) {
        V::store(out, V::as_f(V::template shl<16>(word)));
        V::store(out + kPlane, V::as_f(V::and_i(word, static_cast<std::int32_t>(0xffff0000u))));
      } else {
        V::store(out, V::to_f(V::template sar<24>(V::template shl<24>(word))));
        V::store(out + kPlane, V::to_f(V::template sar<24>(V::template shl<16>(word))));
        V::store(out + 2 * kPlane, V::to_f(V::template sar<24>(V::template shl<8>(word))));
        V::store(out + 3 * kPlane, V::to_f(V::template sar<24>(word)));
      }
    }
  }
};

// Lanes of a and b side by side as pairs of bf16, for numbers that are bf16 or less already.
template <class V>
struct LanePairs {
  using I = typename V::I;
  static I low(I a, I b) { return V::or_i(V::and_i(a, 0xffff), V::template shl<16>(b)); }
  static I high(I a, I b) { return V::or_i(V::template shr<16>(a), upper(b)); }
  // Byte 3 - kShift / 8 of each, as int8.
  template <int kShift>
  static I bytes(I a, I b) {
    return high(widen<kShift>(a), widen<kShift>(b));
  }

 private:
  static I upper(I x) { return V::and_i(x, static_cast<std::int32_t>(0xffff0000u)); }
  template <int kShift>
  static I widen(I x) {
    return V::as_i(V::to_f(V::template sar<24>(V::template shl<kShift>(x))));
  }
};

// A row of tiles a and b, part i of their words as pairs (a, b), to dst + kPart * i.
template <class V, int kWords, int kPart>
inline __attribute__((always_inline)) void expand_lanes(const std::byte* a, const std::byte* b, std::byte* dst) {
  using Pairs = LanePairs<V>;
  const auto x = V::load_i(a), y = V::load_i(b);
  if constexpr (kWords == 2) {
    V::store_i(dst, Pairs::low(x, y));
    V::store_i(dst + kPart, Pairs::high(x, y));
  } else {
    V::store_i(dst, Pairs::template bytes<24>(x, y));
    V::store_i(dst + kPart, Pairs::template bytes<16>(x, y));
    V::store_i(dst + 2 * kPart, Pairs::template bytes<8>(x, y));
    V::store_i(dst + 3 * kPart, Pairs::template bytes<0>(x, y));
  }
}

template <class V>
struct Bf16Products {
  static constexpr int kPerWord = 2;
  using Stored = Bf16PairDot<V>;
  using Cached = InCache<Bf16PairDot<V>>;

  // Words are pairs of consecutive k, as they lie in the rows.
  static void pack(RowSource rows, int m, int columns, int padded, std::byte* dst) {
    interleave_groups<V>(m, padded / 2, dst, [&](int r, int i) { return load_pairs<V>(rows.row<bf16>(r), 32 * i, columns); });
  }
  // Words are pairs of consecutive columns.
  static void pack_grad(RowSource dy, const float* column_scale, int m, int columns, int padded, std::byte* dst) {
    if (!column_scale) return pack(dy, m, columns, padded, dst);
    interleave_groups<V>(m, padded / 2, dst, [&](int r, int p) {
      const bf16* row = dy.row<bf16>(r);
      return V::bf16_row(load_grad<V>(row, column_scale, 32 * p, columns), load_grad<V>(row, column_scale, 32 * p + 16, columns));
    });
  }
  // [pair of rows of P][column of the group], rows padded to 32 with zeros.
  static void pack_outer(const bf16* p, std::ptrdiff_t ld, int m, int p_columns, std::byte* dst) {
    auto* out = reinterpret_cast<std::uint32_t*>(dst);
    each_group<V::kRows>(p_columns, [&](int i0, int n) {
      for (int t = 0; t < round_up(m, 32); t += 2)
        for (int i = 0; i < n; ++i) *out++ = bits(p, ld, m, t, i0 + i) | bits(p, ld, m, t + 1, i0 + i) << 16;
    });
  }

  // Tiles a and b of a k-step -> [word part i][8 pairs of consecutive n of a, 8 of b][16 pairs]: k = kWords * j + i.
  template <int kWords>
  static void expand(const std::byte* a, const std::byte* b, std::byte* dst) {
    if constexpr (kWords == 2) {
      transpose_pairs(a, dst);
      transpose_pairs(b, dst + kTileBytes / 2);
    } else {
      alignas(64) std::byte rows[2 * kTileBytes];  // of constant n
      V::transpose16(a, 64, rows);
      V::transpose16(b, 64, rows + kTileBytes);
      for (int pair = 0; pair < 16; ++pair) expand_lanes<V, kWords, kTileBytes>(rows + 128 * pair, rows + 128 * pair + 64, dst + 64 * pair);
    }
  }

  static void outer_rows(RowSource q, int m, std::ptrdiff_t column, std::byte* dst) {
    static constexpr std::uint16_t kZero[16] = {};
    for (int r = 0; r < round_up(m, 32); r += 2, dst += 64)
      V::store_i(dst, V::zip16(r < m ? q.row<std::uint16_t>(r) + column : kZero, r + 1 < m ? q.row<std::uint16_t>(r + 1) + column : kZero));
  }

 private:
  static void transpose_pairs(const std::byte* tile, std::byte* dst) {
    typename V::I rows[16];
    for (int j = 0; j < 16; ++j) rows[j] = V::cross_pairs(V::load_i(tile + 64 * j));  // words: pairs of even k, pairs of odd k
    V::transpose16(rows, [dst](int i, typename V::I row) { V::store_i(dst + i % 2 * kTileBytes + i / 2 * 64, row); });
  }
  static std::uint32_t bits(const bf16* p, std::ptrdiff_t ld, int m, int t, int i) {
    return t < m ? std::uint32_t{reinterpret_cast<const std::uint16_t*>(p)[t * ld + i]} : 0;
  }
};
