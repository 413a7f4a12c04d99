// Vec for AVX-512 (F, BW, DQ, VL): 16 lanes are one zmm register. The operations are described in vec_portable.h.

struct Vec {
  using F = __m512;
  using I = __m512i;
  static constexpr bool kPlainLoops = false;  // no unrolled instruction sequences
  static constexpr bool kVnni = false;        // has xor_i, dpbusd
  static constexpr bool kBf16Pairs = false;   // has dpbf16
  static constexpr bool kFloatTables = true;  // has lookup
  static constexpr bool kInOrder = false;     // see weight_order-inl.h
  static constexpr int kAhead = 8192;
  static constexpr int kAskInto = 2;
  static constexpr int kAskRows = 3;
  static constexpr bool kHardwareAsks = false;
  static constexpr int kRows = 12;  // 12 x 32 columns = 24 of the 32 registers accumulate
  static constexpr int kTiles = 2;

#define KTMOE_INLINE static inline __attribute__((always_inline))
  KTMOE_INLINE F set(float x) { return _mm512_set1_ps(x); }
  KTMOE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  KTMOE_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  KTMOE_INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
  KTMOE_INLINE F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  KTMOE_INLINE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  KTMOE_INLINE F div(F x, F y) { return _mm512_div_ps(x, y); }
  KTMOE_INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  KTMOE_INLINE F max(F x, F y) { return _mm512_max_ps(x, y); }
  KTMOE_INLINE F min(F x, F y) { return _mm512_min_ps(x, y); }
  KTMOE_INLINE F positive(F x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set(0.0f), _CMP_GT_OQ), set(1.0f)); }
  KTMOE_INLINE void keep_less(F x, F& best, F new_a, F& a, F new_b, F& b) {
    const auto less = _mm512_cmp_ps_mask(x, best, _CMP_LT_OQ);
    best = _mm512_mask_mov_ps(best, less, x);
    a = _mm512_mask_mov_ps(a, less, new_a);
    b = _mm512_mask_mov_ps(b, less, new_b);
  }
  KTMOE_INLINE F abs(F x) { return as_f(and_i(as_i(x), 0x7fffffff)); }
  KTMOE_INLINE float hmax(F x) { return hreduce<true>(x); }
  KTMOE_INLINE float hsum(F x) { return hreduce<false>(x); }

  KTMOE_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
  KTMOE_INLINE void store_i(void* p, I x) { _mm512_storeu_si512(p, x); }
  KTMOE_INLINE I set_i(std::int32_t x) { return _mm512_set1_epi32(x); }
  KTMOE_INLINE I add_i(I x, I y) { return _mm512_add_epi32(x, y); }
  KTMOE_INLINE I sub_i(I x, I y) { return _mm512_sub_epi32(x, y); }
  KTMOE_INLINE I and_i(I x, std::int32_t mask) { return _mm512_and_si512(x, _mm512_set1_epi32(mask)); }
  KTMOE_INLINE I or_i(I x, I y) { return _mm512_or_si512(x, y); }
  template <int N>
  KTMOE_INLINE I shl(I x) {
    return _mm512_slli_epi32(x, N);
  }
  template <int N>
  KTMOE_INLINE I shr(I x) {
    return _mm512_srli_epi32(x, N);
  }
  template <int N>
  KTMOE_INLINE I sar(I x) {
    return _mm512_srai_epi32(x, N);
  }
  template <int N>
  KTMOE_INLINE I sar16(I x) {
    return _mm512_srai_epi16(x, N);
  }
  KTMOE_INLINE F as_f(I x) { return _mm512_castsi512_ps(x); }
  KTMOE_INLINE I as_i(F x) { return _mm512_castps_si512(x); }
  KTMOE_INLINE F to_f(I x) { return _mm512_cvtepi32_ps(x); }
  KTMOE_INLINE I to_i(F x) { return _mm512_cvtps_epi32(x); }

  KTMOE_INLINE F load_bf16(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return as_f(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  KTMOE_INLINE void store_bf16(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
  KTMOE_INLINE void stream_bf16(bf16* p, F x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_bf16(x)); }
  KTMOE_INLINE __m256i round_bf16(F x) {
    const I u = as_i(x);
    const I rounded = add_i(or_odd(u, shr<16>(u), set_i(1)), set_i(0x7fff));
    const I kept = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, set_i(0x400000));
    const I upper = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d, 0, 0,
                                      0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, kept));
  }
  KTMOE_INLINE void store_s8(std::int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }
  KTMOE_INLINE void store_s8_pairs(std::int8_t* p, I even, I odd) {
    const I words = _mm512_mask_mov_epi16(even, 0xaaaaaaaa, shl<16>(odd));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi16_epi8(words));
  }

  KTMOE_INLINE I madd(I acc, I x, I y) { return _mm512_add_epi32(acc, _mm512_madd_epi16(x, y)); }

  KTMOE_INLINE F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  KTMOE_INLINE I bf16_pairs(F even, F odd) {
    const I e = as_i(even), o = as_i(odd), one = _mm512_set1_epi16(1);
    const I upper = _mm512_mask_mov_epi16(shr<16>(e), 0xaaaaaaaa, o), lower = _mm512_mask_mov_epi16(e, 0xaaaaaaaa, shl<16>(o));
    const auto up = _mm512_cmpgt_epu16_mask(or_odd(lower, upper, one), _mm512_set1_epi16(static_cast<short>(0x8000)));
    return _mm512_mask_add_epi16(upper, up, upper, one);
  }
  KTMOE_INLINE F lookup(I index, const float* table) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table)); }
  template <int b>
  KTMOE_INLINE I top_byte(I x) {
    return _mm512_shuffle_epi8(x, _mm512_set4_epi32(pick<b + 12>, pick<b + 8>, pick<b + 4>, pick<b>));
  }
  template <int b>
  KTMOE_INLINE I upper_bytes(I x) {
    return _mm512_shuffle_epi8(x, _mm512_set4_epi32(pick2<b + 12>, pick2<b + 8>, pick2<b + 4>, pick2<b>));
  }
  KTMOE_INLINE I max16(I x, I y) { return _mm512_max_epi16(x, y); }
  KTMOE_INLINE I min16(I x, I y) { return _mm512_min_epi16(x, y); }
  KTMOE_INLINE I lookup_bytes(I index, const std::int8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
  }
  KTMOE_INLINE I mullo16(I x, I y) { return _mm512_mullo_epi16(x, y); }
  KTMOE_INLINE I mulhi16(I x, I y) { return _mm512_mulhi_epu16(x, y); }
  template <int b>
  KTMOE_INLINE I spread(I x) {
    const __m128i pick = _mm_setr_epi32(static_cast<int>(0x80008000u | b << 16 | b), static_cast<int>(0x80048004u + (b << 16 | b)),
                                        static_cast<int>(0x80088008u + (b << 16 | b)), static_cast<int>(0x800c800cu + (b << 16 | b)));
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(pick));
  }
  template <int b>
  KTMOE_INLINE I all_bytes(I x) {
    const __m128i pick = _mm_setr_epi32(b * 0x01010101, (b + 4) * 0x01010101, (b + 8) * 0x01010101, (b + 12) * 0x01010101);
    return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(pick));
  }
  KTMOE_INLINE I add16(I x, I y) { return _mm512_add_epi16(x, y); }
  KTMOE_INLINE I sub16(I x, I y) { return _mm512_sub_epi16(x, y); }
  KTMOE_INLINE I maddubs(I u8, I s8) { return _mm512_maddubs_epi16(u8, s8); }
  KTMOE_INLINE I maddss(I x, I y) {  // |x| times y with the sign of x
    return _mm512_maddubs_epi16(_mm512_abs_epi8(x), _mm512_mask_sub_epi8(y, _mm512_movepi8_mask(x), _mm512_setzero_si512(), y));
  }
  KTMOE_INLINE I pairs(I acc, I x) { return madd(acc, x, set_i(0x00010001)); }
  KTMOE_INLINE I sub8(I x, I y) { return _mm512_sub_epi8(x, y); }

  KTMOE_INLINE void transpose16(const void* src, std::ptrdiff_t stride, void* dst) {
    const auto* s = static_cast<const std::byte*>(src);
    auto* d = static_cast<std::byte*>(dst);
    I r[16];
    for (int i = 0; i < 16; ++i) r[i] = load_i(s + i * stride);
    transpose16(r, [d](int i, I row) { store_i(d + 64 * i, row); });
  }
  // use(j, word j of each of the rows) for all j.
  template <class Use>
  KTMOE_INLINE void transpose16(const I (&r)[16], Use use) {
    I t[16];
    // Within each 128-bit lane: words, then pairs; afterwards t[4q + c] holds, in lane L, column 4L + c of rows 4q .. 4q + 3.
    for (int q = 0; q < 4; ++q) {
      const I a = _mm512_unpacklo_epi32(r[4 * q], r[4 * q + 1]), b = _mm512_unpackhi_epi32(r[4 * q], r[4 * q + 1]);
      const I c = _mm512_unpacklo_epi32(r[4 * q + 2], r[4 * q + 3]), e = _mm512_unpackhi_epi32(r[4 * q + 2], r[4 * q + 3]);
      t[4 * q + 0] = _mm512_unpacklo_epi64(a, c);
      t[4 * q + 1] = _mm512_unpackhi_epi64(a, c);
      t[4 * q + 2] = _mm512_unpacklo_epi64(b, e);
      t[4 * q + 3] = _mm512_unpackhi_epi64(b, e);
    }
    // A 4 x 4 transposition of 128-bit lanes for each c: row 4L + c = lanes L of t[c], t[4 + c], t[8 + c], t[12 + c].
    for (int c = 0; c < 4; ++c) {
      const I lo01 = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88), hi01 = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xdd);
      const I lo23 = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88), hi23 = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xdd);
      use(0 + c, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
      use(4 + c, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
      use(8 + c, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
      use(12 + c, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
    }
  }
  KTMOE_INLINE void interleave(F even, F odd, F& lo, F& hi) {
    const I pick_lo = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const I pick_hi = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    lo = _mm512_permutex2var_ps(even, pick_lo, odd);
    hi = _mm512_permutex2var_ps(even, pick_hi, odd);
  }
  KTMOE_INLINE I zip16(const std::uint16_t* x, const std::uint16_t* y) {
    const I vx = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    const I vy = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(y)));
    return or_i(vx, shl<16>(vy));
  }

 private:
  // pshufb masks for a word: three zeros and byte b; zero, byte b, zero, byte b + 1.
  template <int b>
  static constexpr auto pick = static_cast<std::int32_t>(0x00808080u | b << 24);
  template <int b>
  static constexpr auto pick2 = static_cast<std::int32_t>(0x00800080u | b << 8 | (b + 1) << 24);
  // The half that rounding drops, with a bit more if the half that stays is odd: to be rounded up if it exceeds 0x8000 (ties to even).
  KTMOE_INLINE I or_odd(I dropped, I stays, I one) { return _mm512_ternarylogic_epi32(dropped, stays, one, 0xf8); }  // d | (s & 1)
  template <bool kMax>
  KTMOE_INLINE float hreduce(F x) {  // the tree of vec_portable.h
    const __m256 lo = _mm512_castps512_ps256(x), hi = _mm512_extractf32x8_ps(x, 1);
    const __m256 m = kMax ? _mm256_max_ps(lo, hi) : _mm256_add_ps(lo, hi);
    const __m128 ml = _mm256_castps256_ps128(m), mh = _mm256_extractf128_ps(m, 1);
    __m128 q = kMax ? _mm_max_ps(ml, mh) : _mm_add_ps(ml, mh);
    const __m128 r = _mm_movehl_ps(q, q);
    q = kMax ? _mm_max_ps(q, r) : _mm_add_ps(q, r);
    const __m128 s = _mm_movehdup_ps(q);
    return _mm_cvtss_f32(kMax ? _mm_max_ss(q, s) : _mm_add_ss(q, s));
  }
#undef KTMOE_INLINE
};
