// bf16 -> int4: the search that format/int4.h describes, 16 columns at a time. Every level gives the same bytes: integers, and floats
// without fused multiply-add. Include inside the namespace of a level, after rounding-inl.h.

template <class V>
struct Int4Quantizer {
  using F = typename V::F;
  using I = typename V::I;
  using R = Rounding<V>;
  static constexpr int kBlock = Int4Format::block;

  // rows (<= 16) columns of W, `columns` (<= 64) consecutive k of each; what is beyond counts as zero.
  static void tile(const bf16* src, std::ptrdiff_t ld, int rows, int columns, const float* scale, std::byte* dst) {
    std::memset(dst, 0, Int4Format::rows * kRowBytes);
    for (int b = 0; b < Int4Format::k_step / kBlock; ++b) {
      alignas(64) float row[16][kBlock] = {}, w[kBlock][16];  // in units of the scale; then [k][column]
      for (int r = 0; r < rows && b * kBlock < columns; ++r)
        if (scale[r] > 0.0f && scale[r] <= 3.4e38f)
          V::store(row[r], V::mul(load_row<V>(src + r * ld, b * kBlock, columns), V::set(1.0f / scale[r])));
      V::transpose16(row, sizeof row[0], w);
      block(w, b, dst);
    }
  }

 private:
  static F offset(F m, F z) {  // floor((15 + z) m / 3), as thirds less a third, rounded
    const F third = V::set(1.0f / 3.0f);
    return R::round(V::sub(V::mul(V::mul(V::add(z, V::set(15.0f)), m), third), third));
  }

  // The errors of one m, in 16-bit fixed point: kStep is one step of the codes. |w / m| is at most 20 for the m that are tried, so that
  // numbers stay below 31 steps, and 16 squares of at most 15 steps below 2^31.
  class Trial {
   public:
    Trial(const float (*w)[16], F m) : m_(m), steps_(V::div(V::set(static_cast<float>(kStep)), m)) {
      most_ = both(V::min(V::mul(V::set(127.0f), steps_), V::set(31.0f * kStep)));  // beyond all that is possible, for small m
      for (int k = 0; k < kBlock; k += 2) w_[k / 2] = pair(V::mul(V::load(w[k]), steps_), V::mul(V::load(w[k + 1]), steps_));
    }
    // Sum over the block of (m q - o - w)^2, q the nearest code.
    F error(F o) const {
      const I half = both(kStep / 2), shift = both(V::mul(o, steps_));
      const I low = V::max16(middle(V::add16(V::sub16(shift, most_), both(kStep - 1))), half);
      const I high = V::min16(middle(V::add16(most_, shift)), both(15 * kStep + kStep / 2));
      const I start = V::add16(shift, half);  // so that rounding is cutting off
      I sum[2] = {V::set_i(0), V::set_i(0)};  // apart, since a single chain of additions would wait for itself
#pragma GCC unroll 8
      for (int j = 0; j < kBlock / 2; ++j) {
        const I x = V::add16(w_[j], start), off = V::sub16(V::min16(V::max16(middle(x), low), high), x);
        sum[j % 2] = V::madd(sum[j % 2], off, off);
      }
      return V::mul(V::to_f(V::add_i(sum[0], sum[1])), V::mul(m_, m_));
    }

   private:
    static constexpr int kStep = 512;
    static constexpr auto kWhole = static_cast<std::int32_t>(0xfe00fe00u);  // the bits of whole steps
    static I both(int x) { return V::set_i(x * 0x10001); }
    static I both(F x) { return pair(x, x); }
    static I pair(F low, F high) { return V::or_i(V::and_i(V::to_i(low), 0xffff), V::template shl<16>(V::to_i(high))); }
    // The middle of the step that x lies in.
    static I middle(I x) { return V::or_i(V::and_i(x, kWhole), both(kStep / 2)); }

    F m_, steps_;
    I most_, w_[kBlock / 2];
  };

  struct Choice {
    F m, z, inverse, o, low, high;

    Choice(F m, F z) : m(m), z(z), inverse(V::div(V::set(1.0f), m)) {
      o = offset(m, z);
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
      const Trial trial(w, m);
      // The zero point that centres the range: 7.5 - (least + most) / 2m, in thirds from 5 on.
      const F centre = V::sub(V::set(7.5f), V::div(V::mul(V::add(least, most), V::set(0.5f)), m));
      const F z0 = R::clamp(R::round(V::sub(V::mul(centre, V::set(3.0f)), V::set(15.0f))), 0.0f, 15.0f);
      for (float dz : {-2.0f, -1.0f, 0.0f, 1.0f, 2.0f}) {
        const F z = R::clamp(V::add(z0, V::set(dz)), 0.0f, 15.0f);
        V::keep_less(trial.error(offset(m, z)), best_error, m, best_m, z, best_z);
      }
    }
    store(w, b, Choice(best_m, best_z), dst);
  }

  // Blocks come in order: the code of each is put in front of those before it.
  static void store(const float (*w)[16], int b, const Choice& choice, std::byte* dst) {
    const I code = V::or_i(V::sub_i(V::to_i(choice.m), V::set_i(1)), V::template shl<4>(V::to_i(choice.z)));
    V::store_i(dst, V::or_i(V::template shr<8>(V::load_i(dst)), V::template shl<24>(code)));
    std::byte* row = dst + kRowBytes * (1 + 4 * (b / 2));
    for (int k = 0; k < kBlock; k += 4, row += kRowBytes) {
      I word = V::set_i(0);
      for (int j = 3; j >= 0; --j) word = V::or_i(V::template shl<8>(word), V::to_i(choice.level(V::load(w[k + j]))));
      V::store_i(row, b % 2 ? V::or_i(V::load_i(row), V::template shl<4>(word)) : word);
    }
  }
};
