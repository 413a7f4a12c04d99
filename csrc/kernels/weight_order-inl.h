// In which order few rows read their weights, which come from memory once, and who asks for them ahead.
//
// Levels with kInOrder read them as they lie there, one tile of a k-step after the other, and the hardware asks for them ahead unless the
// instructions on each line keep it from looking far enough: those of formats that are unpacked, from kAskRows rows on those of all, and
// on CPUs that halve each of them those of int8. On Zen 4 (FarBf16Vec) the hardware does well for few rows of any format (kHardwareAsks),
// and more of them ask into the L2. Others read two tiles beside each other and always ask, into the L2: an L1 of Intel's has too few
// misses at a time for one core to fill its share of the bandwidth. Every line must be asked for, rows of scales too: one that is missed
// waits for memory alone.
// What is unpacked or transposed in cache before many rows multiply it is asked for during the products before (AskInTurns). Asked for as
// it is unpacked, memory rests while rows are multiplied, and the core waits before.
//
// Include inside the namespace of a level, after Vec.

//   unpacked   few rows of a format that is unpacked
//   kAskInto   the cache: 3 = L1, 2 = L2, as __builtin_prefetch has it
enum class Ask { never, in_halves, unpacked, always };

template <class V, Ask kAsk, int kDistance = V::kAhead>
inline __attribute__((always_inline)) void ask_ahead(const std::byte* at) {
  if (!V::kInOrder || kAsk == Ask::always || (kAsk == Ask::unpacked && !V::kHardwareAsks) || (kAsk == Ask::in_halves && avx2_in_halves))
    __builtin_prefetch(at + kDistance, 0, V::kAskInto);
}

// use(tile, i) for the two tiles of a k-step and each of their n pieces. kApart: in order, the second tile loads the activations again;
// otherwise the compiler may keep those of both tiles in registers, until it has none left.
template <class V, int n, bool kApart, class Use>
inline __attribute__((always_inline)) void in_tiles(Use use) {
  constexpr std::integral_constant<int, 0> first;
  constexpr std::integral_constant<int, 1> second;
  if constexpr (V::kInOrder) {
    for (int i = 0; i < n; ++i) use(first, i);
    if constexpr (kApart) asm volatile("" ::: "memory");
    for (int i = 0; i < n; ++i) use(second, i);
  } else {
    for (int i = 0; i < n; ++i) {
      use(first, i);
      use(second, i);
    }
  }
}

// Weights that are asked for into the L2 a line at a time, evenly over so many calls: `runs` of `bytes`, `apart` from start to start.
class AskInTurns {
 public:
  AskInTurns() = default;  // none
  AskInTurns(const std::byte* run, int bytes, std::ptrdiff_t apart, int runs, int turns)
      : run_(run), apart_(apart), bytes_(bytes), lines_(runs * ceil_div(bytes, 64)), turns_(turns) {}
  inline __attribute__((always_inline)) void operator()() {
    for (due_ += lines_; due_ >= turns_; due_ -= turns_) {
      __builtin_prefetch(run_ + at_, 0, 2);
      if ((at_ += 64) >= bytes_) at_ = 0, run_ += apart_;
    }
  }

 private:
  const std::byte* run_ = nullptr;
  std::ptrdiff_t apart_ = 0;
  int bytes_ = 0, lines_ = 0, turns_ = 1, at_ = 0, due_ = 0;
};
