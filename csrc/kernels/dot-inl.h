// Dot policies: how 64 bytes of packed weights (16 columns) times one row's activations become 16 accumulators.
//   integers     sums are int32, not fp32
//   words        32-bit activation words that belong to one 64-byte row
//   streamed     the rows are packed weights in memory (and worth prefetching), not a buffer in L1
//   weights<w>   the part of the row that word w multiplies
//   mac          acc + weights * word (the word is broadcast from memory)
// Include inside the namespace of a level, after Vec.

template <class V>
struct Bf16Dot {
  using Acc = typename V::F;
  using Weights = typename V::F;
  static constexpr bool integers = false;
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

// int8 x int8: neighbours summed to 16 bits, then to 32; exact.
template <class V>
struct Int8BytesDot {
  using Acc = typename V::I;
  using Weights = typename V::I;
  static constexpr bool integers = true;
  static constexpr int words = 1;
  static constexpr bool streamed = true;
  static constexpr bool unsigned_weights = false;  // weights + 128, so that sums are too large by 128 * (sum of the activations)
  static Acc zero() { return V::set_i(0); }
  static Acc load(const float* c) { return V::load_i(c); }
  static void store(float* c, Acc a) { V::store_i(c, a); }
  template <int w>
  static Weights weights(const std::byte* row) {
    return of(V::load_i(row));
  }
  static Weights of(typename V::I bytes) { return bytes; }
  static Acc mac(Acc acc, Weights w, const std::uint32_t* x) {
    return V::pairs(acc, V::maddss(w, V::set_i(static_cast<std::int32_t>(*x))));
  }
};

// The same with VNNI, whose first operand is unsigned.
template <class V>
struct Int8VnniDot : Int8BytesDot<V> {
  static constexpr bool unsigned_weights = true;
  template <int w>
  static typename V::I weights(const std::byte* row) {
    return of(V::load_i(row));
  }
  static typename V::I of(typename V::I bytes) { return V::xor_i(bytes, static_cast<std::int32_t>(0x80808080u)); }
  static typename V::I mac(typename V::I acc, typename V::I w, const std::uint32_t* x) {
    return V::dpbusd(acc, w, V::set_i(static_cast<std::int32_t>(*x)));
  }
};

template <class V>
using Int8Dot = std::conditional_t<V::kVnni, Int8VnniDot<V>, Int8BytesDot<V>>;

// The same products on tiles that were unpacked into cache: nothing to prefetch.
template <class Dot>
struct InCache : Dot {
  static constexpr bool streamed = false;
};
