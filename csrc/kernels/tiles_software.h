// The tile instructions in plain C++, so that the tile algorithms run, and are tested, on every host.
// Include inside the namespace of a level.

struct SoftwareTiles {
  using Tile = std::byte[16][64];
  static Tile* tiles() {
    alignas(64) static thread_local Tile state[8];
    return state;
  }
  static void configure() { std::memset(tiles(), 0xa5, 8 * sizeof(Tile)); }  // as on hardware, nothing may be assumed
  static void release() {}
  template <int t>
  static void zero() {
    std::memset(tiles()[t], 0, sizeof(Tile));
  }
  template <int t>
  static void load(const void* p, std::ptrdiff_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(tiles()[t][r], static_cast<const std::byte*>(p) + r * stride, 64);
  }
  template <int t>
  static void load_streamed(const void* p, std::ptrdiff_t stride) {
    load<t>(p, stride);
  }
  template <int t>
  static void store(void* p, std::ptrdiff_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<std::byte*>(p) + r * stride, tiles()[t][r], 64);
  }
  template <bool kInt8, int c, int a, int b>
  static void multiply() {
    if constexpr (kInt8)
      dot<std::int32_t, std::int8_t, 4>(tiles()[c], tiles()[a], tiles()[b]);
    else
      dot<float, bf16, 2>(tiles()[c], tiles()[a], tiles()[b]);
  }

 private:
  static float wide(bf16 x) { return to_float(x); }
  static std::int32_t wide(std::int8_t x) { return x; }
  template <class Sum, class Element, int kPerWord>
  static void dot(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < 16; ++m) {
      Sum sum[16];
      std::memcpy(sum, c[m], 64);
      for (int k = 0; k < 16; ++k) {
        Element x[kPerWord], y[16 * kPerWord];
        std::memcpy(x, a[m] + 4 * k, 4);
        std::memcpy(y, b[k], 64);
        for (int n = 0; n < 16; ++n)
          for (int i = 0; i < kPerWord; ++i) sum[n] += wide(x[i]) * wide(y[kPerWord * n + i]);
      }
      std::memcpy(c[m], sum, 64);
    }
  }
};
