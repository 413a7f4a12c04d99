// Vec for any CPU: 16 lanes as plain loops, which the compiler turns into whatever the baseline has.
// Every Vec offers the same operations on 16 lanes of 32 bits; the algorithms in *-inl.h are written once against them.
// Include inside the namespace of a level. Multiplication and addition never contract, except in fma(): the elementwise kernels use
// add/mul/div alone, so they give the same bits at every level.

struct Vec {
  struct F {
    float v[16];
  };
  struct I {
    std::int32_t v[16];
  };
  static constexpr bool kPlainLoops = true;  // no unrolled instruction sequences
  static constexpr bool kVnni = false;       // has xor_i, dpbusd
  static constexpr bool kBf16Pairs = false;  // has dpbf16
  static constexpr bool kFloatTables = false;
  static constexpr bool kInOrder = true;
  static constexpr int kAhead = 0;
  static constexpr int kAskInto = 3;
  static constexpr int kAskRows = 3;
  static constexpr bool kHardwareAsks = false;
  static constexpr int kRows = 3;   // rows of C that one inner loop accumulates: 12 of 16 registers of 4 lanes
  static constexpr int kTiles = 1;  // tiles of 16 columns beside each other in it

  template <class Op>
  static F each(Op op) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }
  template <class Op>
  static I each_i(Op op) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = op(i);
    return r;
  }

  static F set(float x) {
    return each([&](int) { return x; });
  }
  static F load(const float* p) {
    F r;
    std::memcpy(&r, p, 64);
    return r;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, 64); }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(F a, F b, F c) {  // two roundings here; one where the CPU fuses
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  // As x86 does: the second operand if either is NaN.
  static F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F positive(F a) {  // 1 where a > 0, else 0
    return each([&](int i) { return a.v[i] > 0 ? 1.0f : 0.0f; });
  }
  // Where x < best: best = x, a = new_a, b = new_b.
  static void keep_less(F x, F& best, F new_a, F& a, F new_b, F& b) {
    for (int i = 0; i < 16; ++i)
      if (x.v[i] < best.v[i]) {
        best.v[i] = x.v[i];
        a.v[i] = new_a.v[i];
        b.v[i] = new_b.v[i];
      }
  }
  static F abs(F a) { return as_f(and_i(as_i(a), 0x7fffffff)); }
  static float hmax(F a) {
    float m = a.v[0];
    for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }
  static float hsum(F a) {  // a fixed tree: lane i with lane i + 8, then + 4, + 2, + 1
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    return a.v[0];
  }

  static I load_i(const void* p) {
    I r;
    std::memcpy(&r, p, 64);
    return r;
  }
  static void store_i(void* p, I x) { std::memcpy(p, &x, 64); }
  static I set_i(std::int32_t x) {
    return each_i([&](int) { return x; });
  }
  static I add_i(I a, I b) {
    return each_i(
        [&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) + static_cast<std::uint32_t>(b.v[i])); });
  }
  static I sub_i(I a, I b) {
    return each_i(
        [&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) - static_cast<std::uint32_t>(b.v[i])); });
  }
  static I and_i(I a, std::int32_t mask) {
    return each_i([&](int i) { return a.v[i] & mask; });
  }
  static I or_i(I a, I b) {
    return each_i([&](int i) { return a.v[i] | b.v[i]; });
  }
  template <int N>
  static I shl(I a) {
    return each_i([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << N); });
  }
  template <int N>
  static I shr(I a) {  // logical
    return each_i([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) >> N); });
  }
  template <int N>
  static I sar(I a) {  // arithmetic
    return each_i([&](int i) { return a.v[i] >> N; });
  }
  static F as_f(I a) {
    F r;
    std::memcpy(&r, &a, 64);
    return r;
  }
  static I as_i(F a) {
    I r;
    std::memcpy(&r, &a, 64);
    return r;
  }
  static F to_f(I a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  // Round to nearest even, for |a| < 2^22; any value for the rest.
  static I to_i(F a) {
    const F magic = set(12582912.0f);
    return sub_i(as_i(add(a, magic)), as_i(magic));
  }

  // 16 consecutive bf16 as floats, and back (round to nearest even, NaN stays NaN).
  static F load_bf16(const bf16* p) {
    return each([&](int i) { return to_float(p[i]); });
  }
  // 16 consecutive IEEE halves (finite ones) as floats.
  static F load_f16(const void* p) {
    return each([&](int i) { return f16_to_float(load_as<std::uint16_t>(static_cast<const std::byte*>(p) + 2 * i)); });
  }
  static void store_bf16(bf16* p, F x) {
    for (int i = 0; i < 16; ++i) p[i] = to_bf16(x.v[i]);
  }
  // The same past the caches, p at a multiple of 32 bytes.
  static void stream_bf16(bf16* p, F x) { store_bf16(p, x); }
  static void store_s8(std::int8_t* p, I x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(x.v[i]);
  }

  // 32 consecutive bytes, the numbers (within -128 .. 127) of even and of odd places apart.
  static void store_s8_pairs(std::int8_t* p, I even, I odd) {
    for (int i = 0; i < 16; ++i) {
      p[2 * i] = static_cast<std::int8_t>(even.v[i]);
      p[2 * i + 1] = static_cast<std::int8_t>(odd.v[i]);
    }
  }

  // Each lane: bf16 of even in the low half, of odd in the high half; round to nearest even. No NaN but those that are bf16 numbers.
  static I bf16_pairs(F even, F odd) {
    return each_i([&](int i) {
      return pair16(static_cast<std::int16_t>(to_bf16(even.v[i]).bits), static_cast<std::int16_t>(to_bf16(odd.v[i]).bits));
    });
  }
  // Two signed 16-bit numbers a lane.
  static I max16(I a, I b) {
    return each_halves(a, b, [](std::int16_t x, std::int16_t y) { return x > y ? x : y; });
  }
  static I min16(I a, I b) {
    return each_halves(a, b, [](std::int16_t x, std::int16_t y) { return x < y ? x : y; });
  }
  // Two unsigned 16-bit numbers a lane: low and high half of their products; four bytes a lane: a - b, wrapping.
  static I mullo16(I a, I b) {
    return each_halves(a, b, [](std::uint16_t x, std::uint16_t y) { return std::uint32_t{x} * y; });
  }
  static I mulhi16(I a, I b) {
    return each_halves(a, b, [](std::uint16_t x, std::uint16_t y) { return std::uint32_t{x} * y >> 16; });
  }
  // Each byte, 0 .. 15, replaced by that entry of the table.
  static I lookup_bytes(I index, const std::int8_t* table) {
    std::int8_t bytes[64];
    std::memcpy(bytes, &index, sizeof bytes);
    for (std::int8_t& byte : bytes) byte = table[byte];
    std::memcpy(&index, bytes, sizeof bytes);
    return index;
  }
  // Two signed 16-bit numbers a lane.
  template <int n>
  static I sar16(I a) {
    return each_halves(a, a, [](std::int16_t x, std::int16_t) { return x >> n; });
  }
  // Byte b of each lane in both of its 16-bit halves.
  template <int b>
  static I spread(I a) {
    return each_i([&](int i) { return (a.v[i] >> 8 * b & 255) * 0x00010001; });
  }
  // Byte b of each lane in all four of its bytes.
  template <int b>
  static I all_bytes(I a) {
    return each_i([&](int i) { return static_cast<std::int32_t>((static_cast<std::uint32_t>(a.v[i]) >> 8 * b & 255) * 0x01010101u); });
  }
  // Bytes b and b + 1 of each lane, times 256, as 16-bit numbers.
  template <int b>
  static I upper_bytes(I a) {
    return each_i([&](int i) {
      const auto x = static_cast<std::uint32_t>(a.v[i]) >> 8 * b;
      return static_cast<std::int32_t>((x & 255) << 8 | (x >> 8 & 255) << 24);
    });
  }
  static I add16(I a, I b) {
    return each_halves(a, b, [](std::uint16_t x, std::uint16_t y) { return x + y; });
  }
  static I sub16(I a, I b) {
    return each_halves(a, b, [](std::uint16_t x, std::uint16_t y) { return x - y; });
  }
  // Two 16-bit numbers a lane: unsigned bytes of a times signed bytes of b, neighbours added (callers keep it below 2^15).
  static I maddubs(I a, I b) {
    return each_halves(a, b, [](std::uint16_t x, std::int16_t y) { return (x & 255) * static_cast<std::int8_t>(y) + (x >> 8) * (y >> 8); });
  }
  // The same for signed bytes, none of b below -127, so that sums stay below 2^15.
  static I maddss(I a, I b) {
    return each_halves(a, b, [](std::int16_t x, std::int16_t y) {
      return static_cast<std::int8_t>(x) * static_cast<std::int8_t>(y) + (x >> 8) * (y >> 8);
    });
  }
  // acc + both signed 16-bit numbers of each lane.
  static I pairs(I acc, I a) {
    return each_i([&](int i) { return acc.v[i] + static_cast<std::int16_t>(a.v[i]) + (a.v[i] >> 16); });
  }
  static I sub8(I a, I b) {
    const auto high = static_cast<std::int32_t>(0x80808080u);
    return each_i([&](int i) { return ((a.v[i] | high) - (b.v[i] & ~high)) ^ ((a.v[i] ^ ~b.v[i]) & high); });
  }

  // acc + a.lo * b.lo + a.hi * b.hi of the two int16 of each lane.
  static I madd(I acc, I a, I b) {
    std::int16_t x[32], y[32];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    return each_i([&](int i) { return acc.v[i] + x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]; });
  }

  // dst[j][i] = src[i][j] for 16 x 16 words; rows of src at `stride` bytes, dst dense.
  static void transpose16(const void* src, std::ptrdiff_t stride, void* dst) {
    std::uint32_t t[16][16];
    for (int i = 0; i < 16; ++i) {
      std::uint32_t row[16];
      std::memcpy(row, static_cast<const std::byte*>(src) + i * stride, 64);
      for (int j = 0; j < 16; ++j) t[j][i] = row[j];
    }
    std::memcpy(dst, t, sizeof t);
  }
  // lo = e0 o0 e1 o1 ... e7 o7, hi = e8 o8 ... e15 o15
  static void interleave(F even, F odd, F& lo, F& hi) {
    for (int i = 0; i < 8; ++i) {
      lo.v[2 * i] = even.v[i];
      lo.v[2 * i + 1] = odd.v[i];
      hi.v[2 * i] = even.v[8 + i];
      hi.v[2 * i + 1] = odd.v[8 + i];
    }
  }
  // lanes: (lo half-word of a lane i, lo half-word of b lane i) from two sequences of 16 half-words
  static I zip16(const std::uint16_t* a, const std::uint16_t* b) {
    return each_i([&](int i) { return static_cast<std::int32_t>(std::uint32_t{a[i]} | std::uint32_t{b[i]} << 16); });
  }

 private:
  // Each lane as two 16-bit numbers: the compiler finds the baseline's instructions for those in arrays of them alone.
  template <class Op>
  static I each_halves(I a, I b, Op op) {
    std::int16_t x[32], y[32];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    for (int i = 0; i < 32; ++i) x[i] = static_cast<std::int16_t>(op(x[i], y[i]));
    std::memcpy(&a, x, sizeof x);
    return a;
  }
  static std::int32_t pair16(std::int16_t lo, std::int16_t hi) {
    return static_cast<std::int32_t>((static_cast<std::uint32_t>(static_cast<std::uint16_t>(hi)) << 16) | static_cast<std::uint16_t>(lo));
  }
};
