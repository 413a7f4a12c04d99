// Few rows in groups of at most kGroup, whose sums stay in registers: the operand is one after the other of them. A Dot has
//   row_bytes(padded)                                     of the operand, for each row
//   pack_group(rows, r0, n, k, padded, dst)               rows r0 .. r0 + n - 1
//   run<n>(panel, k_steps, operand, c, ldc, accumulate)   a group times one panel
// Include inside the namespace of a level, after Vec.

// 16 floats of a bf16 row from column j; columns at or beyond `columns` are zero and are not read.
template <class V>
struct VectorRow {
  static typename V::F load(const bf16* row, int j, int columns) {
    if (j + 16 <= columns) return V::load_bf16(row + j);
    bf16 tail[16] = {};
    if (j < columns) std::memcpy(tail, row + j, 2 * static_cast<std::size_t>(columns - j));
    return V::load_bf16(tail);
  }
};

// The weights of few rows come from memory once. kInOrder levels read them as they lie there, one tile of a k-step after the other, and the
// hardware asks for them ahead unless the instructions on each line keep it from looking far enough (kSlow). Others read two tiles beside
// each other and always ask.
template <class V, bool kSlow>
inline __attribute__((always_inline)) void ask_ahead(const std::byte* at) {
  if constexpr (kSlow || !V::kInOrder) __builtin_prefetch(at + V::kAhead, 0, 3);
}

// use(tile, i) for the two tiles of a k-step and each of their n pieces.
template <class V, int n, class Use>
inline __attribute__((always_inline)) void in_tiles(Use use) {
  constexpr std::integral_constant<int, 0> first;
  constexpr std::integral_constant<int, 1> second;
  if constexpr (V::kInOrder) {
    for (int i = 0; i < n; ++i) use(first, i);
    for (int i = 0; i < n; ++i) use(second, i);
  } else {
    for (int i = 0; i < n; ++i) {
      use(first, i);
      use(second, i);
    }
  }
}

template <class Dot>
struct RowGroups {
  static constexpr int kGroup = 4;

  // m rows of bf16, k columns, padded to `padded`.
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) {
    for (int r = 0; r < m; r += kGroup, dst += kGroup * Dot::row_bytes(padded))
      Dot::pack_group(rows, r, std::min(m - r, kGroup), k, padded, dst);
  }

  // All rows of an operand times one panel.
  static void panel(const std::byte* operand, int m, int padded, const std::byte* panel, int k_steps, float* c, std::ptrdiff_t ldc,
                    bool accumulate) {
    static constexpr decltype(&Dot::template run<1>) runs[] = {&Dot::template run<1>, &Dot::template run<2>, &Dot::template run<3>,
                                                               &Dot::template run<4>};
    static_assert(std::size(runs) == kGroup);
    for (int r = 0; r < m; r += kGroup, operand += kGroup * Dot::row_bytes(padded), c += kGroup * ldc)
      runs[std::min(m - r, kGroup) - 1](panel, k_steps, operand, c, ldc, accumulate);
  }
};
