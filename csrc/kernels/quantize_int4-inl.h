// bf16 -> int4: the search that format/int4.h describes, 16 columns at a time. No fused multiply-add: every level gives the same bytes.
// Include inside the namespace of a level, after rounding-inl.h.

template <class V>
struct Int4Quantizer {
  using F = typename V::F;
  using I = typename V::I;
  using R = Rounding<V>;
  static constexpr int kBlock = Int4Format::block;

  // rows (<= 16) columns of W, `columns` (<= 64) consecutive k of each; what is beyond counts as zero.
  static void tile(const bf16* src, std::ptrdiff_t ld, int rows, int columns, const float* scale, std::byte* dst) {
    alignas(64) float w[Int4Format::k_step][16] = {};  // in units of the scale, [k][column]
    alignas(64) float inverse[16] = {};
    for (int r = 0; r < rows; ++r) inverse[r] = scale[r] > 0.0f && scale[r] <= 3.4e38f ? 1.0f / scale[r] : 0.0f;
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < columns; ++k) w[k][r] = inverse[r] == 0.0f ? 0.0f : to_float(src[r * ld + k]) * inverse[r];
    std::memset(dst, 0, Int4Format::rows * kRowBytes);
    for (int b = 0; b < Int4Format::k_step / kBlock; ++b) block(&w[b * kBlock], b, dst);
  }

 private:
  struct Choice {
    F m, z, inverse, o, low, high;

    Choice(F m, F z) : m(m), z(z), inverse(V::div(V::set(1.0f), m)) {
      o = R::floor(V::div(V::mul(V::add(z, V::set(15.0f)), m), V::set(3.0f)));
      high = V::min(V::set(15.0f), R::floor(V::div(V::add(o, V::set(127.0f)), m)));
      low = V::max(V::set(0.0f), R::ceil(V::div(V::sub(o, V::set(127.0f)), m)));
    }
    F level(F w) const { return V::min(V::max(R::round(V::mul(V::add(w, o), inverse)), low), high); }
    F value(F q) const { return V::sub(V::mul(q, m), o); }
  };

  static void block(const float (*w)[16], int b, std::byte* dst) {
    F least = V::load(w[0]), most = least;
    for (int k = 1; k < kBlock; ++k) {
      least = V::min(least, V::load(w[k]));
      most = V::max(most, V::load(w[k]));
    }
    // The least m whose 15 steps span the block, from -10 m to 10 m at the outermost zero points.
    const F reach = V::div(V::max(most, V::sub(V::set(0.0f), least)), V::set(10.0f));
    const F m0 = R::clamp(R::ceil(V::max(V::div(V::sub(most, least), V::set(15.0f)), reach)), 1.0f, 16.0f);
    F best_error = V::set(3e38f), best_m = m0, best_z = V::set(0.0f);
    for (float dm : {-1.0f, 0.0f, 1.0f, 2.0f, 3.0f}) {
      const F m = R::clamp(V::add(m0, V::set(dm)), 1.0f, 16.0f);
      // The zero point that centres the range: 7.5 - (least + most) / 2m, in thirds from 5 on.
      const F centre = V::sub(V::set(7.5f), V::div(V::mul(V::add(least, most), V::set(0.5f)), m));
      const F z0 = R::clamp(R::round(V::sub(V::mul(centre, V::set(3.0f)), V::set(15.0f))), 0.0f, 15.0f);
      for (float dz : {-2.0f, -1.0f, 0.0f, 1.0f, 2.0f}) {
        const Choice choice(m, R::clamp(V::add(z0, V::set(dz)), 0.0f, 15.0f));
        F error[4];  // apart, since a single chain of additions would wait for itself
#pragma GCC unroll 16
        for (int k = 0; k < kBlock; ++k) {
          const F x = V::load(w[k]), off = V::sub(choice.value(choice.level(x)), x), square = V::mul(off, off);
          error[k % 4] = k < 4 ? square : V::add(error[k % 4], square);
        }
        V::keep_less(V::add(V::add(error[0], error[1]), V::add(error[2], error[3])), best_error, choice.m, best_m, choice.z, best_z);
      }
    }
    store(w, b, Choice(best_m, best_z), dst);
  }

  static void store(const float (*w)[16], int b, const Choice& choice, std::byte* dst) {
    alignas(64) std::int32_t m[16], z[16], q[16];
    V::store_i(m, V::to_i(choice.m));
    V::store_i(z, V::to_i(choice.z));
    for (int c = 0; c < 16; ++c) tile_word(dst, 0, c)[b] = static_cast<std::byte>((m[c] - 1) | z[c] << 4);
    for (int k = 0; k < kBlock; ++k) {
      V::store_i(q, V::to_i(choice.level(V::load(w[k]))));
      for (int c = 0; c < 16; ++c) tile_word(dst, 1 + 4 * (b / 2) + k / 4, c)[k % 4] |= static_cast<std::byte>(q[c] << (4 * (b % 2)));
    }
  }
};
