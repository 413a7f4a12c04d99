// Floats -> blocks of published formats: what files of those formats hold. Largest means largest magnitude. No fused multiply-add: every
// level gives the same bytes. A block with a number that is not finite gets a scale that is not finite (FP8: such codes), which loading
// refuses.
//
//   int4_g*    scale = bf16(largest / 7), q = w / scale
//   int4_g*z   16 levels from the least weight (or 0) to the greatest (or 0), one of them 0
//   fp8        scale = largest / 448 of all blocks of the call, nearest e4m3
//   q8_0       d = largest / 127, halves away from zero; q4_0: the largest, with its sign, is -8 d. Both as ggml does
//   mxfp4      the power of two of largest / 4, nearest e2m1, ties to the smaller one
//   q4_k       quantize_q4_k-inl.h
// Include inside the namespace of a level, after quantize_q4_k-inl.h.

template <class V>
struct BlockQuantizer {
  using F = typename V::F;
  using I = typename V::I;
  using R = Rounding<V>;

  static void blocks(WeightFormat format, const float* w, int n, std::byte* const* parts) {
    switch (format) {
      case WeightFormat::int4_g32:
        return each(w, n, 32, [&](int b, const float* x) { int4<32>(x, parts[0] + 16 * b, parts[1] + 2 * b); });
      case WeightFormat::int4_g64:
        return each(w, n, 64, [&](int b, const float* x) { int4<64>(x, parts[0] + 32 * b, parts[1] + 2 * b); });
      case WeightFormat::int4_g128:
        return each(w, n, 128, [&](int b, const float* x) { int4<128>(x, parts[0] + 64 * b, parts[1] + 2 * b); });
      case WeightFormat::int4_g32z:
        return each(w, n, 32, [&](int b, const float* x) { int4_zero<32>(x, parts[0] + 16 * b, parts[1] + 2 * b, parts[2] + b); });
      case WeightFormat::int4_g64z:
        return each(w, n, 64, [&](int b, const float* x) { int4_zero<64>(x, parts[0] + 32 * b, parts[1] + 2 * b, parts[2] + b); });
      case WeightFormat::int4_g128z:
        return each(w, n, 128, [&](int b, const float* x) { int4_zero<128>(x, parts[0] + 64 * b, parts[1] + 2 * b, parts[2] + b); });
      case WeightFormat::fp8:
        return fp8(w, n, parts[0], parts[1]);
      case WeightFormat::q8_0:
        return each(w, n, 32, [&](int b, const float* x) { q8_0(x, parts[0] + 34 * b); });
      case WeightFormat::q4_0:
        return each(w, n, 32, [&](int b, const float* x) { q4_0(x, parts[0] + 18 * b); });
      case WeightFormat::mxfp4:
        return each(w, n, 32, [&](int b, const float* x) { mxfp4(x, parts[0] + 17 * b); });
      case WeightFormat::q4_k:
        for (int b = 0; b < n; b += 16) Q4KQuantizer<V>::blocks(w + 256 * b, n - b < 16 ? n - b : 16, parts[0] + 144 * b);
        return;
      default:
        return;  // formats that are only ever read from files
    }
  }

 private:
  template <class Block>
  static void each(const float* w, int n, int block, Block quantize) {
    for (int b = 0; b < n; ++b) quantize(b, w + std::ptrdiff_t{block} * b);
  }

  struct Range {
    float least, most;
    bool finite;  // if not, the others mean nothing
    float largest() const { return most > -least ? most : -least; }
  };
  static Range range(const float* w, int n) {
    F least = V::load(w), most = least, poison = V::mul(least, V::set(0.0f));
    for (int j = 16; j < n; j += 16) {
      const F x = V::load(w + j);
      least = V::min(least, x);
      most = V::max(most, x);
      poison = V::add(poison, V::mul(x, V::set(0.0f)));
    }
    return {-V::hmax(V::sub(V::set(0.0f), least)), V::hmax(most), V::hsum(poison) == 0.0f};
  }

  static void store_u8(std::byte* p, I x) { V::store_s8(reinterpret_cast<std::int8_t*>(p), V::template sar<24>(V::template shl<24>(x))); }
  static void store_nibbles(const std::byte* q, int n, std::byte* p) {
    for (int j = 0; j < n; j += 8) {
      const std::uint32_t word = squeeze<4>(load_as<std::uint64_t>(q + j));
      std::memcpy(p + j / 2, &word, 4);
    }
  }
  static void put_bf16(std::byte* p, bool finite, float x) {
    const bf16 bits = finite ? to_bf16(x) : bf16{0x7fc0};
    std::memcpy(p, &bits, 2);
  }
  static void put_f16(std::byte* p, bool finite, float x) {
    const std::uint16_t bits = finite ? to_f16(x) : std::uint16_t{0x7e00};
    std::memcpy(p, &bits, 2);
  }

  template <int G>
  static void int4(const float* w, std::byte* codes, std::byte* scale_at) {
    const Range r = range(w, G);
    const float scale = to_float(to_bf16(r.largest() / 7.0f));
    put_bf16(scale_at, r.finite, scale);
    alignas(64) std::byte q[G];
    for (int j = 0; j < G; j += 16) {
      F level = V::set(0.0f);
      if (r.finite && scale > 0.0f) level = R::clamp(V::div(V::load(w + j), V::set(scale)), -8.0f, 7.0f);
      store_u8(q + j, V::add_i(V::to_i(level), V::set_i(8)));
    }
    store_nibbles(q, G, codes);
  }

  template <int G>
  static void int4_zero(const float* w, std::byte* codes, std::byte* scale_at, std::byte* zero_at) {
    const Range r = range(w, G);
    const float low = r.least < 0.0f ? r.least : 0.0f, high = r.most > 0.0f ? r.most : 0.0f;
    const float scale = to_float(to_bf16((high - low) / 15.0f)), divisor = scale == 0.0f ? 1.0f : scale;
    put_bf16(scale_at, r.finite, scale);
    F zero = V::set(0.0f);
    if (r.finite) zero = R::clamp(V::div(V::set(-low), V::set(divisor)), 0.0f, 15.0f);
    zero = R::round(zero);
    alignas(64) std::byte q[G], zeros[16];
    store_u8(zeros, V::to_i(zero));
    *zero_at = zeros[0];
    for (int j = 0; j < G; j += 16) {
      F level = V::set(0.0f);
      if (r.finite) level = R::clamp(V::div(V::load(w + j), V::set(divisor)), -16.0f, 16.0f);
      store_u8(q + j, V::to_i(R::clamp(V::add(R::round(level), zero), 0.0f, 15.0f)));
    }
    store_nibbles(q, G, codes);
  }

  // n blocks (<= 128) of 128 with one scale, which is written for each of them.
  static void fp8(const float* w, int n, std::byte* codes, std::byte* scales) {
    constexpr int kBlock = Fp8Format::block;
    float largest = 0.0f;
    bool finite[kBlock];
    for (int b = 0; b < n; ++b) {
      const float* x = w + kBlock * b;
      const Range r = range(x, kBlock);
      finite[b] = r.finite;
      if (r.finite) largest = largest > r.largest() ? largest : r.largest();
      for (int j = 0; !r.finite && j < kBlock; ++j)
        if (std::isfinite(x[j]) && std::fabs(x[j]) > largest) largest = std::fabs(x[j]);
    }
    const float scale = largest / 448.0f;
    const F divisor = V::set(scale > 0.0f ? scale : 1.0f);
    for (int b = 0; b < n; ++b) {
      const float* x = w + kBlock * b;
      std::byte* q = codes + kBlock * b;
      std::memcpy(scales + 4 * b, &scale, 4);
      for (int j = 0; j < kBlock; j += 16) store_u8(q + j, e4m3(V::div(V::load(x + j), divisor)));
      for (int j = 0; !finite[b] && j < kBlock; ++j)
        if (!std::isfinite(x[j])) q[j] = std::byte{0x7f};
    }
  }
  // Nearest e4m3 of each lane, ties to even; what is beyond 448 becomes 448.
  static I e4m3(F x) {
    const F size = V::min(V::abs(x), V::set(448.0f));
    // The power of two below, but not below that of the subnormals; a step of the mantissa is an eighth of it.
    const F power = V::max(V::as_f(V::and_i(V::as_i(size), 0x7f800000)), V::set(0x1p-6f));
    const F magic = V::mul(power, V::set(0x1.8p20f));  // whose last place is that step
    const F rounded = V::sub(V::add(size, magic), magic);
    // The bits of a code are those of a float 2^120 times smaller: see fp8.h.
    const I code = V::template shr<20>(V::as_i(V::mul(rounded, V::set(0x1p-120f))));
    return V::or_i(code, V::and_i(V::template shr<24>(V::as_i(x)), 0x80));
  }

  static float inverse(float d) { return std::fabs(d) > 0x1p-126f ? 1.0f / d : 0.0f; }

  static void q8_0(const float* w, std::byte* dst) {
    const Range r = range(w, 32);
    const float d = r.largest() / 127.0f;
    put_f16(dst, r.finite, d);
    const F id = V::set(r.finite ? inverse(d) : 0.0f);
    for (int j = 0; j < 32; j += 16) {
      const F x = r.finite ? V::mul(V::load(w + j), id) : V::set(0.0f), size = V::abs(x), even = R::round(size);
      // Half a step above an even number was rounded down.
      const F away = V::add(even, V::positive(V::sub(V::sub(size, even), V::set(0x1.fffffep-2f))));
      const I signs = V::and_i(V::as_i(x), static_cast<std::int32_t>(0x80000000u));
      V::store_s8(reinterpret_cast<std::int8_t*>(dst) + 2 + j, V::to_i(V::as_f(V::or_i(V::as_i(away), signs))));
    }
  }

  static void q4_0(const float* w, std::byte* dst) {
    const Range r = range(w, 32);
    float largest = r.most > -r.least ? r.most : r.least;
    if (r.finite && r.most == -r.least) {  // the first one
      int j = 0;
      while (std::fabs(w[j]) != r.most) ++j;
      largest = w[j];
    }
    const float d = largest / -8.0f;
    put_f16(dst, r.finite, d);
    const F id = V::set(r.finite ? inverse(d) : 0.0f);
    auto level = [&](int j) {
      const F x = r.finite ? V::mul(V::load(w + j), id) : V::set(0.0f);
      return V::to_i(R::floor(R::clamp(V::add(x, V::set(8.5f)), 0.0f, 15.0f)));
    };
    store_u8(dst + 2, V::or_i(level(0), V::template shl<4>(level(16))));
  }

  static void mxfp4(const float* w, std::byte* dst) {
    const Range r = range(w, 32);
    const float largest = r.largest();
    const int power = static_cast<int>(load_as<std::uint32_t>(&largest) >> 23 & 255) - 2, e = power > 0 ? power : 0;
    dst[0] = static_cast<std::byte>(r.finite ? e : 255);
    const std::uint32_t bits = static_cast<std::uint32_t>(254 - e) << 23;
    const F factor = V::set(r.finite ? load_as<float>(&bits) : 0.0f);
    auto code = [&](int j) {
      const F x = r.finite ? V::load(w + j) : V::set(0.0f), size = V::mul(V::abs(x), factor);
      F level = V::set(0.0f);
      for (float between : {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f})
        level = V::add(level, V::positive(V::sub(size, V::set(between))));
      const F negative = V::mul(V::positive(level), V::positive(V::sub(V::set(0.0f), x)));
      return V::to_i(V::add(level, V::mul(negative, V::set(8.0f))));
    };
    store_u8(dst + 1, V::or_i(code(0), V::template shl<4>(code(16))));
  }
};
