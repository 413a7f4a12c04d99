// Dot policies: how 64 bytes of packed weights (16 columns) times one row's activations become 16 accumulators.
//   words        32-bit activation words that belong to one 64-byte row
//   streamed     the rows are packed weights in memory (and worth prefetching), not a buffer in L1
//   weights<w>   the part of the row that word w multiplies
//   mac          acc + weights * word (the word is broadcast from memory)
//   pack         the activation words of 64 / 32 consecutive k of one row
// Include inside the namespace of a level, after Vec.

template <class V>
struct Bf16Dot {
  using Acc = typename V::F;
  using Weights = typename V::F;
  static constexpr int words = 2;
  static constexpr bool streamed = true;
  static Acc zero() { return V::set(0.0f); }
  static Acc load(const float* c) { return V::load(c); }
  static void store(float* c, Acc a) { V::store(c, a); }
  template <int w>
  static Weights weights(const std::byte* row) {
    const auto bits = V::load_i(row);
    return V::as_f(w == 0 ? V::template shl<16>(bits) : V::and_i(bits, static_cast<std::int32_t>(0xffff0000u)));
  }
  static Acc mac(Acc acc, Weights w, const std::uint32_t* x) { return V::fma(w, V::set(*reinterpret_cast<const float*>(x)), acc); }
};

// Rows of 16 fp32: expanded weights and gradients.
template <class V>
struct F32Dot : Bf16Dot<V> {
  static constexpr int words = 1;
  static constexpr bool streamed = false;
  template <int w>
  static typename V::F weights(const std::byte* row) {
    return V::load(reinterpret_cast<const float*>(row));
  }
};

// Pairs of bf16 as they lie in the tile, both products at once.
template <class V>
struct Bf16PairDot : Bf16Dot<V> {
  using Weights = typename V::I;
  static constexpr int words = 1;
  template <int w>
  static Weights weights(const std::byte* row) {
    return V::load_i(row);
  }
  static typename V::F mac(typename V::F acc, Weights w, const std::uint32_t* x) {
    return V::dpbf16(acc, w, V::set_i(static_cast<std::int32_t>(*x)));
  }
};

// int8 x int8 through int16 pairs: exact, and without the saturation of the byte-wise instruction.
template <class V>
struct Int8PairDot {
  using Acc = typename V::I;
  using Weights = typename V::I;
  static constexpr int words = 2;
  static constexpr bool streamed = true;
  static constexpr bool unsigned_weights = false;
  static Acc zero() { return V::set_i(0); }
  static Acc load(const float* c) { return V::load_i(c); }
  static void store(float* c, Acc a) { V::store_i(c, a); }
  template <int w>
  static Weights weights(const std::byte* row) {
    return of<w>(V::load_i(row));
  }
  template <int w>
  static Weights of(typename V::I bytes) {
    return w == 0 ? V::even_s8(bytes) : V::odd_s8(bytes);
  }
  static Acc mac(Acc acc, Weights w, const std::uint32_t* x) { return V::madd(acc, w, V::set_i(static_cast<std::int32_t>(*x))); }
  // Four int8 -> words (x0, x2), (x1, x3).
  static void pack(const std::int8_t* x, std::uint32_t* word0, std::uint32_t* word1) {
    *word0 = static_cast<std::uint16_t>(x[0]) | static_cast<std::uint32_t>(static_cast<std::uint16_t>(x[2])) << 16;
    *word1 = static_cast<std::uint16_t>(x[1]) | static_cast<std::uint32_t>(static_cast<std::uint16_t>(x[3])) << 16;
  }
};

// int8 x int8 from bytes: |w| times x with the sign of w, summed in pairs to int16 (at most 2 * 128 * 127: exact, since activations are
// never -128), then to int32. Fewer steps from memory to sum than the pairs above, but more registers: for few rows.
template <class V>
struct Int8SignDot : Int8PairDot<V> {
  static constexpr int words = 1;
  template <int w>
  static typename V::I weights(const std::byte* row) {
    return V::load_i(row);
  }
  template <int w>
  static typename V::I of(typename V::I bytes) {
    return bytes;
  }
  static typename V::I mac(typename V::I acc, typename V::I w, const std::uint32_t* x) {
    const typename V::I signed_x = V::sign8(V::set_i(static_cast<std::int32_t>(*x)), w);
    return V::madd(acc, V::maddubs(V::abs8(w), signed_x), V::set_i(0x00010001));
  }
  static void pack(const std::int8_t* x, std::uint32_t* word0, std::uint32_t*) { std::memcpy(word0, x, 4); }
};

// int8 x int8 with VNNI, whose first operand is unsigned: weights + 128, corrected by 128 * (sum of the activations) at the end.
template <class V>
struct Int8VnniDot : Int8PairDot<V> {
  static constexpr int words = 1;
  static constexpr bool unsigned_weights = true;
  template <int w>
  static typename V::I weights(const std::byte* row) {
    return of<w>(V::load_i(row));
  }
  template <int w>
  static typename V::I of(typename V::I bytes) {
    return V::xor_i(bytes, static_cast<std::int32_t>(0x80808080u));
  }
  static typename V::I mac(typename V::I acc, typename V::I w, const std::uint32_t* x) {
    return V::dpbusd(acc, w, V::set_i(static_cast<std::int32_t>(*x)));
  }
  static void pack(const std::int8_t* x, std::uint32_t* word0, std::uint32_t*) { std::memcpy(word0, x, 4); }
};

// The same products on tiles that were unpacked into cache: nothing to prefetch.
template <class Dot>
struct InCache : Dot {
  static constexpr bool streamed = false;
};
