// Vec for AVX2 + FMA: 16 lanes in two ymm registers. The operations are described in vec_portable.h.

struct Vec {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  static constexpr bool kPlainLoops = false;  // no unrolled instruction sequences
  static constexpr bool kVnni = false;        // has xor_i, dpbusd
  static constexpr bool kBf16Pairs = false;   // has dpbf16
  static constexpr bool kFloatTables = false;
  static constexpr bool kInOrder = true;  // see weight_order-inl.h
  static constexpr int kAhead = 8192;
  static constexpr int kAskInto = 3;
  static constexpr int kAskRows = 3;
  static constexpr bool kHardwareAsks = false;
  static constexpr int kRows = 6;  // 6 x 16 columns = 12 of the 16 registers accumulate
  static constexpr int kTiles = 1;

#define KTMOE_INLINE static inline __attribute__((always_inline))
  KTMOE_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  KTMOE_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  KTMOE_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  KTMOE_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  KTMOE_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  KTMOE_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  KTMOE_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  KTMOE_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  KTMOE_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  KTMOE_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  KTMOE_INLINE F positive(F x) {
    const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
    return {_mm256_and_ps(one, _mm256_cmp_ps(x.a, zero, _CMP_GT_OQ)), _mm256_and_ps(one, _mm256_cmp_ps(x.b, zero, _CMP_GT_OQ))};
  }
  KTMOE_INLINE void keep_less(F x, F& best, F new_a, F& a, F new_b, F& b) {
    const F less{_mm256_cmp_ps(x.a, best.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, best.b, _CMP_LT_OQ)};
    auto take = [&](F& to, F from) { to = {_mm256_blendv_ps(to.a, from.a, less.a), _mm256_blendv_ps(to.b, from.b, less.b)}; };
    take(best, x);
    take(a, new_a);
    take(b, new_b);
  }
  KTMOE_INLINE F abs(F x) { return as_f(and_i(as_i(x), 0x7fffffff)); }
  KTMOE_INLINE float hmax(F x) {
    const __m256 m = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  KTMOE_INLINE float hsum(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }

  KTMOE_INLINE I load_i(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  KTMOE_INLINE void store_i(void* p, I x) {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
  }
  KTMOE_INLINE I set_i(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  KTMOE_INLINE I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  KTMOE_INLINE I sub_i(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  KTMOE_INLINE I and_i(I x, std::int32_t mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
  }
  KTMOE_INLINE I or_i(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <int N>
  KTMOE_INLINE I shl(I x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
  }
  template <int N>
  KTMOE_INLINE I shr(I x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
  }
  template <int N>
  KTMOE_INLINE I sar(I x) {
    return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
  }
  template <int N>
  KTMOE_INLINE I sar16(I x) {
    return {_mm256_srai_epi16(x.a, N), _mm256_srai_epi16(x.b, N)};
  }
  KTMOE_INLINE F as_f(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  KTMOE_INLINE I as_i(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  KTMOE_INLINE F to_f(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  KTMOE_INLINE I to_i(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }

  KTMOE_INLINE F load_bf16(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(h)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1)), 16))};
  }
  KTMOE_INLINE void store_bf16(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
  KTMOE_INLINE void stream_bf16(bf16* p, F x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
  KTMOE_INLINE __m256i round_bf16(F x) {
    const __m256i packed = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));  // per 128-bit half: a0-3 b0-3 | a4-7 b4-7
    return _mm256_permute4x64_epi64(packed, 0xd8);
  }
  KTMOE_INLINE void store_s8(std::int8_t* p, I x) {
    const __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
  }
  KTMOE_INLINE void store_s8_pairs(std::int8_t* p, I even, I odd) {
    const I high = shl<16>(odd);
    const __m256i a = _mm256_blend_epi16(even.a, high.a, 0xaa), b = _mm256_blend_epi16(even.b, high.b, 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8));
  }

  KTMOE_INLINE I madd(I acc, I x, I y) {
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
  }

  KTMOE_INLINE F load_f16(const void* p) {
    const auto* h = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
  }
  KTMOE_INLINE I bf16_pairs(F even, F odd) { return {bf16_pairs8(even.a, odd.a), bf16_pairs8(even.b, odd.b)}; }
  template <int b>
  KTMOE_INLINE I top_byte(I x) {
    const __m256i mask =
        _mm256_setr_epi32(pick<b>, pick<b + 4>, pick<b + 8>, pick<b + 12>, pick<b>, pick<b + 4>, pick<b + 8>, pick<b + 12>);
    return {_mm256_shuffle_epi8(x.a, mask), _mm256_shuffle_epi8(x.b, mask)};
  }
  template <int b>
  KTMOE_INLINE I upper_bytes(I x) {
    const __m256i mask =
        _mm256_setr_epi32(pick2<b>, pick2<b + 4>, pick2<b + 8>, pick2<b + 12>, pick2<b>, pick2<b + 4>, pick2<b + 8>, pick2<b + 12>);
    return {_mm256_shuffle_epi8(x.a, mask), _mm256_shuffle_epi8(x.b, mask)};
  }
  KTMOE_INLINE I max16(I x, I y) { return {_mm256_max_epi16(x.a, y.a), _mm256_max_epi16(x.b, y.b)}; }
  KTMOE_INLINE I min16(I x, I y) { return {_mm256_min_epi16(x.a, y.a), _mm256_min_epi16(x.b, y.b)}; }
  // Each byte, 0 .. 15, replaced by that entry of the table.
  KTMOE_INLINE I lookup_bytes(I index, const std::int8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
  }
  KTMOE_INLINE I mullo16(I x, I y) { return {_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)}; }
  KTMOE_INLINE I mulhi16(I x, I y) { return {_mm256_mulhi_epu16(x.a, y.a), _mm256_mulhi_epu16(x.b, y.b)}; }
  template <int b>
  KTMOE_INLINE I spread(I x) {
    const __m256i pick = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(0x80008000u | b << 16 | b)),
                                          _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004, 0x00080008, 0x000c000c));
    return {_mm256_shuffle_epi8(x.a, pick), _mm256_shuffle_epi8(x.b, pick)};
  }
  template <int b>
  KTMOE_INLINE I all_bytes(I x) {
    const __m256i pick =
        _mm256_broadcastsi128_si256(_mm_setr_epi32(b * 0x01010101, (b + 4) * 0x01010101, (b + 8) * 0x01010101, (b + 12) * 0x01010101));
    return {_mm256_shuffle_epi8(x.a, pick), _mm256_shuffle_epi8(x.b, pick)};
  }
  KTMOE_INLINE I add16(I x, I y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
  KTMOE_INLINE I sub16(I x, I y) { return {_mm256_sub_epi16(x.a, y.a), _mm256_sub_epi16(x.b, y.b)}; }
  KTMOE_INLINE I maddubs(I u8, I s8) { return {_mm256_maddubs_epi16(u8.a, s8.a), _mm256_maddubs_epi16(u8.b, s8.b)}; }
  KTMOE_INLINE I maddss(I x, I y) {  // |x| times y with the sign of x
    return {_mm256_maddubs_epi16(_mm256_abs_epi8(x.a), _mm256_sign_epi8(y.a, x.a)),
            _mm256_maddubs_epi16(_mm256_abs_epi8(x.b), _mm256_sign_epi8(y.b, x.b))};
  }
  KTMOE_INLINE I pairs(I acc, I x) { return madd(acc, x, set_i(0x00010001)); }
  KTMOE_INLINE I sub8(I x, I y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }

  KTMOE_INLINE void transpose16(const void* src, std::ptrdiff_t stride, void* dst) {
    const auto* s = static_cast<const std::byte*>(src);
    auto* d = static_cast<float*>(dst);
    __m256 q[4][8];  // all of src before any of dst: they may be the same memory
    for (int bi = 0; bi < 2; ++bi)
      for (int bj = 0; bj < 2; ++bj)
        for (int i = 0; i < 8; ++i) q[2 * bi + bj][i] = _mm256_loadu_ps(reinterpret_cast<const float*>(s + (8 * bi + i) * stride) + 8 * bj);
    for (int bi = 0; bi < 2; ++bi)
      for (int bj = 0; bj < 2; ++bj) transpose8(q[2 * bi + bj], d + 8 * bj * 16 + 8 * bi);
  }
  KTMOE_INLINE void interleave(F even, F odd, F& lo, F& hi) {
    interleave8(even.a, odd.a, lo.a, lo.b);
    interleave8(even.b, odd.b, hi.a, hi.b);
  }
  KTMOE_INLINE I zip16(const std::uint16_t* x, const std::uint16_t* y) {
    const __m256i vx = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), 0xd8);
    const __m256i vy = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(y)), 0xd8);
    return {_mm256_unpacklo_epi16(vx, vy), _mm256_unpackhi_epi16(vx, vy)};
  }

 private:
  // pshufb masks for a word: three zeros and byte b; zero, byte b, zero, byte b + 1.
  template <int b>
  static constexpr auto pick = static_cast<std::int32_t>(0x00808080u | b << 24);
  template <int b>
  static constexpr auto pick2 = static_cast<std::int32_t>(0x00800080u | b << 8 | (b + 1) << 24);
  // Without a word for NaN: round_bf16 has it.
  KTMOE_INLINE __m256i rounded_up(__m256 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  }
  KTMOE_INLINE __m256i bf16_pairs8(__m256 even, __m256 odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded_up(even), 16), rounded_up(odd), 0xaa);
  }
  // Upper half = x rounded to bf16, in the low 16 bits of each lane.
  KTMOE_INLINE __m256i round_bf16(__m256 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
  KTMOE_INLINE void interleave8(__m256 e, __m256 o, __m256& lo, __m256& hi) {
    const __m256 l = _mm256_unpacklo_ps(e, o), h = _mm256_unpackhi_ps(e, o);
    lo = _mm256_permute2f128_ps(l, h, 0x20);
    hi = _mm256_permute2f128_ps(l, h, 0x31);
  }
  KTMOE_INLINE void transpose8(const __m256 r[8], float* d) {  // d has a row stride of 16 floats
    __m256 t[8], u[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int h = 0; h < 2; ++h) {
      u[4 * h + 0] = _mm256_shuffle_ps(t[4 * h], t[4 * h + 2], 0x44);
      u[4 * h + 1] = _mm256_shuffle_ps(t[4 * h], t[4 * h + 2], 0xee);
      u[4 * h + 2] = _mm256_shuffle_ps(t[4 * h + 1], t[4 * h + 3], 0x44);
      u[4 * h + 3] = _mm256_shuffle_ps(t[4 * h + 1], t[4 * h + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(d + i * 16, _mm256_permute2f128_ps(u[i], u[4 + i], 0x20));
      _mm256_storeu_ps(d + (4 + i) * 16, _mm256_permute2f128_ps(u[i], u[4 + i], 0x31));
    }
  }
#undef KTMOE_INLINE
};
