// Vec for AVX-512 with VNNI: one instruction for 4 int8 products per lane. Include after vec_avx512.h.

struct VnniVec : Vec {
  static constexpr bool kVnni = true;
  static inline __attribute__((always_inline)) I xor_i(I x, std::int32_t mask) { return _mm512_xor_si512(x, _mm512_set1_epi32(mask)); }
  static inline __attribute__((always_inline)) I dpbusd(I acc, I u8, I s8) { return _mm512_dpbusd_epi32(acc, u8, s8); }
};
