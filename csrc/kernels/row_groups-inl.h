// Rows of bf16 activations, and few of them in groups of at most kGroup, whose sums stay in registers: the operand is one group after the
// other. A Dot has
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
