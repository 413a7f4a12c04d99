// Vec for AVX2 with AVX-VNNI: vec_vnni.h for 256 bits. Include after vec_avx2.h.

struct VnniVec : Vec {
  static constexpr bool kVnni = true;
  static inline __attribute__((always_inline)) I xor_i(I x, std::int32_t mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return {_mm256_xor_si256(x.a, m), _mm256_xor_si256(x.b, m)};
  }
  static inline __attribute__((always_inline)) I madd(I acc, I x, I y) {
    return {_mm256_dpwssd_avx_epi32(acc.a, x.a, y.a), _mm256_dpwssd_avx_epi32(acc.b, x.b, y.b)};
  }
  static inline __attribute__((always_inline)) I dpbusd(I acc, I u8, I s8) {
    return {_mm256_dpbusd_avx_epi32(acc.a, u8.a, s8.a), _mm256_dpbusd_avx_epi32(acc.b, u8.b, s8.b)};
  }
};
