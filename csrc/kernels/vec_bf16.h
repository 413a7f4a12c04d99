// Vec for AVX-512 with VNNI and BF16: one instruction for 2 bf16 products per lane. It takes subnormal numbers as zero, as tiles do.
// Include after vec_vnni.h.

struct Bf16Vec : VnniVec {
  static constexpr bool kBf16Pairs = true;
  static inline __attribute__((always_inline)) F dpbf16(F acc, I x, I y) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
  static inline __attribute__((always_inline)) I bf16_pairs(F even, F odd) {
    const I halves = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(odd, even));  // 16 of even, then 16 of odd
    const I low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves)), high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
    return or_i(low, shl<16>(high));
  }
};
