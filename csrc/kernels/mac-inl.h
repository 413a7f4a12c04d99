// The one inner loop of every vector kernel: R rows x NT tiles of 16 columns accumulate over K.
//
//   weights      steps of 16 rows x 64 bytes; consecutive steps at step_stride, the NT tiles of a step at tile_stride
//   activations  for every 64-byte row: Dot::words words of each of the R rows, [word][R]
//   c            R rows of NT * 16 accumulators at stride ldc (floats), tile t at column 16 * t
//   between      called after each 64-byte row of weights that are in cache (mac_turns() times in all): time to ask for others
// Include inside the namespace of a level, after dot-inl.h.

inline constexpr int kStepBlock = 8;  // k-steps whose two tiles (16 KB) stay in L1 while the rows pass by
inline constexpr int kStepBlockBytes = kStepBlock * 2 * kTileBytes;

// One row of tiles t0 .. t0 + count - 1; `row` is that of the first.
template <class V, class Dot, int R, int NT, int t0, int count, int word = 0>
static inline __attribute__((always_inline)) void mac_row(typename Dot::Acc (&acc)[R][NT], const std::byte* row, std::ptrdiff_t tile_stride,
                                                          const std::uint32_t* x) {
  typename Dot::Weights w[count];
#pragma GCC unroll 2
  for (int t = 0; t < count; ++t) w[t] = Dot::template weights<word>(row + t * tile_stride);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < count; ++t) acc[r][t0 + t] = Dot::mac(acc[r][t0 + t], w[t], x + word * R + r);
  if constexpr (word + 1 < Dot::words) mac_row<V, Dot, R, NT, t0, count, word + 1>(acc, row, tile_stride, x);
}

struct Nothing {
  void operator()() const {}
};

// kOnce: the weights are read for these rows alone, in the order of weight_order-inl.h; otherwise the tiles share what is loaded of x.
template <class V, class Dot, int R, int NT, Ask kAsk, bool kOnce, class Between>
void mac_asking(const std::byte* w, std::ptrdiff_t step_stride, std::ptrdiff_t tile_stride, int steps, const std::uint32_t* x, float* c,
                std::ptrdiff_t ldc, bool accumulate, Between& between) {
  typename Dot::Acc acc[R][NT];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < NT; ++t) acc[r][t] = accumulate ? Dot::load(c + r * ldc + 16 * t) : Dot::zero();
  for (int s = 0; s < steps; ++s, w += step_stride, x += 16 * Dot::words * R) {
    if constexpr (Dot::streamed && kOnce && (R <= 2 || V::kInOrder) && NT == 2) {
      in_tiles<V, 16, (R > 2)>([&](auto t, int j) __attribute__((always_inline)) {
        const std::byte* row = w + t * tile_stride + 64 * j;
        ask_ahead<V, kAsk>(row);
        if constexpr (kAsk == Ask::never && V::kTiles == 2) asm volatile("" ::: "memory");  // lest the compiler change the order
        mac_row<V, Dot, R, NT, t, 1>(acc, row, tile_stride, x + j * Dot::words * R);
      });
    } else {
      for (int j = 0; j < 16; ++j) {
        const std::byte* row = w + 64 * j;
        if constexpr (Dot::streamed)  // comes from DRAM the first time: a whole step block ahead into L2
#pragma GCC unroll 2
          for (int t = 0; t < NT; ++t) __builtin_prefetch(row + t * tile_stride + kStepBlockBytes, 0, 2);
        mac_row<V, Dot, R, NT, 0, NT>(acc, row, tile_stride, x + j * Dot::words * R);
        between();
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < NT; ++t) Dot::store(c + r * ldc + 16 * t, acc[r][t]);
}

// Ask::in_halves for integers, decided once: with the question at every line the loop loses what asking gains.
template <class V, class Dot, int R, int NT, bool kOnce, class Between>
void mac(const std::byte* w, std::ptrdiff_t step_stride, std::ptrdiff_t tile_stride, int steps, const std::uint32_t* x, float* c,
         std::ptrdiff_t ldc, bool accumulate, Between& between) {
  if constexpr (Dot::integers && Dot::streamed && V::kInOrder && R < V::kAskRows)
    if (avx2_in_halves)
      return mac_asking<V, Dot, R, NT, Ask::always, kOnce>(w, step_stride, tile_stride, steps, x, c, ldc, accumulate, between);
  constexpr Ask kAsk = R >= V::kAskRows ? Ask::always : Ask::never;
  mac_asking<V, Dot, R, NT, kAsk, kOnce>(w, step_stride, tile_stride, steps, x, c, ldc, accumulate, between);
}

// Both tiles of a k-step in one pass, where the registers allow it or the weights come from memory for this pass alone.
template <class V, class Dot>
bool in_one_pass(int m) {
  return V::kTiles == 2 || m <= 2 || (Dot::streamed && V::kInOrder && m <= V::kRows);
}

template <class V, class Dot>
int mac_turns(int n_tiles, int steps, int m) {
  return 16 * steps * ceil_div(m, V::kRows) * ceil_div(n_tiles, in_one_pass<V, Dot>(m) ? 2 : 1);
}

// All m rows of an operand in groups (each_group<V::kRows>), words_per_row for each row; NT from the number of rows, never from the data.
template <class V, class Dot, class Between = Nothing>
void mac_rows(const std::byte* w, std::ptrdiff_t step_stride, std::ptrdiff_t tile_stride, int n_tiles, int first_step, int steps,
              const std::uint32_t* x, std::size_t words_per_row, int m, float* c, std::ptrdiff_t ldc, bool accumulate,
              Between between = {}) {
  const std::size_t skip = static_cast<std::size_t>(first_step) * 16 * Dot::words;
  const bool wide = in_one_pass<V, Dot>(m);
  constexpr bool kOrdered = Dot::streamed && V::kInOrder && V::kTiles == 2;  // whether the order depends on the passes at all
  const bool once = !kOrdered || m <= V::kRows;
  for (int t = 0; t < n_tiles; t += wide ? 2 : 1)
    each_group<V::kRows>(m, [&](int r0, int rows) {
      const std::uint32_t* group = x + static_cast<std::size_t>(r0) * words_per_row + skip * static_cast<std::size_t>(rows);
      const std::byte* tile = w + t * tile_stride;
      float* dst = c + r0 * ldc + 16 * t;
      const auto run = !(wide && t + 1 < n_tiles) ? for_rows<V::kRows>(rows, [](auto r) { return &mac<V, Dot, r, 1, true, Between>; })
                       : once                     ? for_rows<V::kRows>(rows, [](auto r) { return &mac<V, Dot, r, 2, true, Between>; })
                                                  : for_rows<V::kRows>(rows, [](auto r) { return &mac<V, Dot, r, 2, !kOrdered, Between>; });
      run(tile, step_stride, tile_stride, steps, group, dst, ldc, accumulate, between);
    });
}
