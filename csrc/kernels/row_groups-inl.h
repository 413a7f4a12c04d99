// Rows of bf16 activations, and few of them in groups whose sums stay in registers: an operand is one group after the other.
// Include inside the namespace of a level, after Vec.

// Of vector levels, whose kernels have room for so many.
inline constexpr int kMostBlockRows = 96;

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
