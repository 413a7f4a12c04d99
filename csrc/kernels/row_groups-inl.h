// Rows of bf16 activations, and few of them in groups of at most Dot::kGroup, whose sums stay in registers: the operand is one group
// after the other. A Dot has
//   kGroup, kMostRows                                     most rows of a group, and of an operand
//   row_bytes(padded)                                     of the operand, for each row
//   pack_group(rows, r0, n, k, padded, dst)               rows r0 .. r0 + n - 1
//   run<n>(panel, k_steps, operand, c, ldc, accumulate)   a group times one panel
// Include inside the namespace of a level, after Vec.

// 16 floats of a bf16 row from column j; columns at or beyond `columns` are zero and are not read.
template <class V>
inline typename V::F load_row(const bf16* row, int j, int columns) {
  if (j + 16 <= columns) return V::load_bf16(row + j);
  bf16 tail[16] = {};
  if (j < columns) std::memcpy(tail, row + j, 2 * static_cast<std::size_t>(columns - j));
  return V::load_bf16(tail);
}

// m rows in as few groups of at most kMost as can be, none much smaller than the others: use(first row, rows).
template <int kMost, class Use>
inline void each_group(int m, Use use) {
  const int size = ceil_div(m, std::max(ceil_div(m, kMost), 1));
  for (int r = 0; r < m; r += size) use(r, std::min(m - r, size));
}

// of(R) for R = rows, 1 .. kMost: a function for each number of rows, chosen by a table.
template <int kMost, class Of>
inline auto for_rows(int rows, Of) {
  return [rows]<int... r>(std::integer_sequence<int, r...>) {
    static constexpr decltype(Of{}(std::integral_constant<int, 1>{})) functions[] = {Of{}(std::integral_constant<int, r + 1>{})...};
    return functions[rows - 1];
  }(std::make_integer_sequence<int, kMost>{});
}

template <class Dot>
struct RowGroups {
  static constexpr int kMostRows = Dot::kMostRows;

  static std::size_t bytes(int m, int padded) { return static_cast<std::size_t>(m) * static_cast<std::size_t>(Dot::row_bytes(padded)); }

  // m rows of bf16, k columns, padded to `padded`.
  static void pack(RowSource rows, int m, int k, int padded, std::byte* dst) {
    each_group<Dot::kGroup>(m, [&](int r, int n) { Dot::pack_group(rows, r, n, k, padded, dst + r * Dot::row_bytes(padded)); });
  }

  // All rows of an operand times one panel.
  static void panel(const std::byte* operand, int m, int padded, const std::byte* panel, int k_steps, float* c, std::ptrdiff_t ldc,
                    bool accumulate) {
    each_group<Dot::kGroup>(m, [&](int r, int n) {
      const auto run = for_rows<Dot::kGroup>(n, [](auto rows) { return &Dot::template run<rows>; });
      run(panel, k_steps, operand + r * Dot::row_bytes(padded), c + r * ldc, ldc, accumulate);
    });
  }
};
