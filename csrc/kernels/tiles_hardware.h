// The tile instructions, in our own assembly: gcc 12's intrinsics lack the memory clobber, so the compiler may move them across the
// loads and stores of the scratch they read and write. Include inside the namespace of a level.

struct HardwareTiles {
  static void configure() {
    struct alignas(64) Config {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Config config{};
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  static void release() { asm volatile("tilerelease" ::: "memory"); }

#define KTMOE_INLINE static inline __attribute__((always_inline))
  template <int t>
  KTMOE_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  KTMOE_INLINE void load(const void* p, std::ptrdiff_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(stride) : "memory");
  }
  template <int t>
  KTMOE_INLINE void load_streamed(const void* p, std::ptrdiff_t stride) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(stride) : "memory");
  }
  template <int t>
  KTMOE_INLINE void store(void* p, std::ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"(stride) : "memory");
  }
  // C += A B: bf16 pairs into fp32, or signed int8 quads into int32.
  template <bool kInt8, int c, int a, int b>
  KTMOE_INLINE void multiply() {
    if constexpr (kInt8)
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
    else
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
#undef KTMOE_INLINE
};
