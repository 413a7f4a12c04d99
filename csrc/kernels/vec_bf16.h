// Vec for AVX-512 with VNNI, VBMI and BF16. Include after vec_vnni.h.

// Rounds to bf16 by one instruction, to operands of tiles or of dpbf16: all of them take subnormal numbers as zero.
struct RoundingVec : VnniVec {
  static inline __attribute__((always_inline)) I bf16_pairs(F even, F odd) {
    const I zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                                   17, 1, 16, 0);
    return _mm512_permutexvar_epi16(zip, reinterpret_cast<I>(_mm512_cvtne2ps_pbh(odd, even)));  // 16 of even, then 16 of odd
  }
  // 16-bit lanes 0, 1, 2, 3 of each 64 -> 0, 2, 1, 3.
  static inline __attribute__((always_inline)) I cross_pairs(I x) {
    const __m128i pick = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(pick));
  }
  template <int N>
  static inline __attribute__((always_inline)) I shl16(I x) {
    return _mm512_slli_epi16(x, N);
  }
  template <int N>
  static inline __attribute__((always_inline)) I shr16(I x) {
    return _mm512_srli_epi16(x, N);
  }
  // Byte table[i & 127] for each byte i.
  static inline __attribute__((always_inline)) I lookup_bytes128(I index, const std::uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
  }
};

// One instruction for 2 bf16 products per lane.
struct Bf16Vec : RoundingVec {
  static constexpr bool kBf16Pairs = true;
  static constexpr bool kInOrder = true;  // as AMD's memory likes it; others prefer avx512vnni
  static constexpr int kAhead = 6144;
  static constexpr int kAskInto = 3;
  static constexpr int kAskRows = 2;
  static inline __attribute__((always_inline)) F dpbf16(F acc, I x, I y) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
  // 32 consecutive numbers.
  static inline __attribute__((always_inline)) I bf16_row(F first, F second) {
    return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(second, first));
  }
};

// The same for CPUs whose memory is best asked into the L2, and where few rows leave all of it to the hardware: Zen 4.
struct FarBf16Vec : Bf16Vec {
  static constexpr int kAhead = 12288;
  static constexpr int kAskInto = 2;
  static constexpr int kAskRows = 5;
  static constexpr bool kHardwareAsks = true;
};
