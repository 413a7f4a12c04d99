// Floats -> Q4_K: w = d scale q - dmin floor, 16 blocks at a time, one in each lane. The search minimises the squared error, in three
// steps:
//   1. each group of 32 alone, with real numbers: several widths are tried; for the codes that a width gives, the best (step, low) is a
//      line fit in closed form
//   2. scale and floor are rounded to 6 bits, on the d and dmin that their largest values give
//   3. twice: with d and dmin fixed, the neighbours of each (scale, floor) are tried, then (d, dmin) is fitted over the whole block
// No fused multiply-add: every level gives the same bytes. Include inside the namespace of a level, after rounding-inl.h.

template <class V>
struct Q4KQuantizer {
  using F = typename V::F;
  using I = typename V::I;
  using R = Rounding<V>;
  static constexpr int kGroups = 8, kGroup = 32, kBlock = kGroups * kGroup, kBytes = 144;

  // n (<= 16) blocks of 256 floats -> n times 144 bytes. One with a number that is not finite, or too large for f16, gets d = NaN.
  static void blocks(const float* w, int n, std::byte* dst) {
    alignas(64) float staged[16][kBlock] = {};
    bool broken[16] = {};
    for (int b = 0; b < n; ++b) {
      std::memcpy(staged[b], w + kBlock * b, sizeof staged[b]);
      F poison = V::set(0.0f);
      for (int j = 0; j < kBlock; j += 16) poison = V::add(poison, V::mul(V::load(staged[b] + j), V::set(0.0f)));
      broken[b] = V::hsum(poison) != 0.0f;
      if (broken[b]) std::memset(staged[b], 0, sizeof staged[b]);
    }
    Q4KQuantizer q;
    for (int j = 0; j < kBlock; j += 16) V::transpose16(&staged[0][j], kBlock * 4, q.w_[j]);
    q.search();
    q.store(n, broken, dst);
  }

 private:
  struct Line {  // w ~ step q - low
    F step, low;
  };
  struct Moments {
    F error, q, qq, qw;  // sums over a group
  };

  alignas(64) float w_[kBlock][16];
  F sum_w_[kGroups], scale_[kGroups], floor_[kGroups], d_, dmin_;

  static F zero() { return V::set(0.0f); }
  static F not_negative(F x) { return V::max(x, zero()); }  // 0 for NaN, too
  // a / b where b > 0, else 0.
  static F ratio(F a, F b) {
    const F sound = V::positive(b);
    return V::mul(V::div(a, V::max(b, V::set(1e-30f))), sound);
  }

  static F level(F w, F low, F inverse) { return R::round(R::clamp(V::mul(V::add(w, low), inverse), 0.0f, 15.0f)); }
  static F inverse(F step) { return V::div(V::set(1.0f), V::max(step, V::set(1e-30f))); }
  static F square(F x) { return V::mul(x, x); }

  static F off(const Line& line, F q, F w) { return V::sub(V::sub(V::mul(q, line.step), line.low), w); }

  F error(int g, const Line& line) const {
    const F inv = inverse(line.step);
    F even = zero(), odd = zero();  // apart, since one chain of additions would wait for itself
    for (const float (*w)[16] = w_ + kGroup * g, (*end)[16] = w + kGroup; w != end; w += 2) {
      const F a = V::load(w[0]), b = V::load(w[1]);
      even = V::add(even, square(off(line, level(a, line.low, inv), a)));
      odd = V::add(odd, square(off(line, level(b, line.low, inv), b)));
    }
    return V::add(even, odd);
  }
  Moments moments(int g, const Line& line) const {
    const F inv = inverse(line.step);
    Moments m{zero(), zero(), zero(), zero()};
    for (int k = 0; k < kGroup; ++k) {
      const F w = V::load(w_[kGroup * g + k]), q = level(w, line.low, inv);
      m.error = V::add(m.error, square(off(line, q, w)));
      m.q = V::add(m.q, q);
      m.qq = V::add(m.qq, V::mul(q, q));
      m.qw = V::add(m.qw, V::mul(q, w));
    }
    return m;
  }

  void search() {
    Line line[kGroups];
    for (int g = 0; g < kGroups; ++g) line[g] = fit_group(g);
    F most_step = line[0].step, most_low = line[0].low;
    for (const Line& l : line) most_step = V::max(most_step, l.step), most_low = V::max(most_low, l.low);
    d_ = unit(most_step);
    dmin_ = unit(most_low);
    for (int g = 0; g < kGroups; ++g) {
      scale_[g] = R::round(R::clamp(ratio(line[g].step, d_), 0.0f, 63.0f));
      floor_[g] = R::round(R::clamp(ratio(line[g].low, dmin_), 0.0f, 63.0f));
    }
    for (int round = 0; round < 2; ++round) {
      for (int g = 0; g < kGroups; ++g) try_neighbours(g);
      fit_block();
    }
  }

  // --- 1 ---
  Line fit_group(int g) {
    F least = zero(), most = zero(), sum_w = zero();
    for (int k = 0; k < kGroup; ++k) {
      const F w = V::load(w_[kGroup * g + k]);
      least = V::min(least, w);
      most = V::max(most, w);
      sum_w = V::add(sum_w, w);
    }
    sum_w_[g] = sum_w;
    const F reach = V::sub(most, least), middle = V::mul(V::add(most, least), V::set(0.5f)), group = V::set(32.0f);
    Line best{V::div(reach, V::set(15.0f)), V::sub(zero(), least)};
    F best_error = error(g, best);
    for (float width : {0.72f, 0.8f, 0.88f, 0.96f}) {  // of the full range, that the codes are spread over at first
      const F step = V::mul(reach, V::set(width / 15.0f));
      const Moments m = moments(g, {step, not_negative(V::sub(V::mul(step, V::set(7.5f)), middle))});
      const F determinant = V::sub(V::mul(group, m.qq), V::mul(m.q, m.q));
      const F low = ratio(V::sub(V::mul(m.q, m.qw), V::mul(m.qq, sum_w)), determinant);
      const F free = ratio(V::sub(V::mul(group, m.qw), V::mul(m.q, sum_w)), determinant);
      // A line above zero is not expressible: through zero instead.
      const F above = V::positive(V::sub(zero(), low)), through_zero = ratio(m.qw, m.qq);
      const F chosen = V::add(V::mul(above, through_zero), V::mul(V::sub(V::set(1.0f), above), free));
      const Line fit{not_negative(chosen), not_negative(low)};
      V::keep_less(error(g, fit), best_error, fit.step, best.step, fit.low, best.low);
    }
    return best;
  }

  // --- 2 ---
  static F to_half(F x) {
    alignas(64) float lanes[16];
    V::store(lanes, x);
    for (float& lane : lanes) lane = f16_to_float(to_f16(lane));
    return V::load(lanes);
  }
  // In which the largest is 63; the least f16 rather than 0 for very small ones.
  static F unit(F largest) { return V::mul(V::positive(largest), V::max(to_half(V::div(largest, V::set(63.0f))), V::set(0x1p-24f))); }

  // --- 3 ---
  Line line_of(F d, F dmin, int g) const { return {V::mul(d, scale_[g]), V::mul(dmin, floor_[g])}; }

  void try_neighbours(int g) {
    const F scale = scale_[g], floor = floor_[g];
    F best = V::set(3e38f);
    for (float up : {0.0f, -1.0f, 1.0f})
      for (float lift : {0.0f, -1.0f, 1.0f}) {
        const F s = R::clamp(V::add(scale, V::set(up)), 0.0f, 63.0f), f = R::clamp(V::add(floor, V::set(lift)), 0.0f, 63.0f);
        V::keep_less(error(g, {V::mul(d_, s), V::mul(dmin_, f)}), best, s, scale_[g], f, floor_[g]);
      }
  }

  // Least squares of w = d a - dmin floor over the block, a = scale q; kept where it is better and expressible.
  void fit_block() {
    F before = zero(), aa = zero(), ab = zero(), bb = zero(), aw = zero(), bw = zero();
    for (int g = 0; g < kGroups; ++g) {
      const Moments m = moments(g, line_of(d_, dmin_, g));
      const F s = scale_[g], f = floor_[g];
      before = V::add(before, m.error);
      aa = V::add(aa, V::mul(square(s), m.qq));
      ab = V::add(ab, V::mul(V::mul(s, f), m.q));
      bb = V::add(bb, V::mul(square(f), V::set(32.0f)));
      aw = V::add(aw, V::mul(s, m.qw));
      bw = V::add(bw, V::mul(f, sum_w_[g]));
    }
    const F determinant = V::sub(V::mul(aa, bb), square(ab));
    const F d = to_half(ratio(V::sub(V::mul(aw, bb), V::mul(ab, bw)), determinant));
    const F dmin = to_half(ratio(V::sub(V::mul(ab, aw), V::mul(aa, bw)), determinant));
    F after = zero();
    for (int g = 0; g < kGroups; ++g) after = V::add(after, error(g, line_of(d, dmin, g)));
    const F bad = V::add(V::sub(V::set(1.0f), V::positive(d)), V::positive(V::sub(zero(), dmin)));
    V::keep_less(V::add(after, V::mul(bad, V::set(3e38f))), before, d, d_, dmin, dmin_);
  }

  // --- bytes ---
  void store(int n, const bool* broken, std::byte* dst) const {
    // Byte j of the nibbles holds the same place of two neighbouring groups: four of them are a word of each lane.
    alignas(64) std::int32_t words[kBlock / 8][16], of_block[2][16][16];
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      const Line low = line_of(d_, dmin_, 2 * pair), high = line_of(d_, dmin_, 2 * pair + 1);
      const F inv_low = inverse(low.step), inv_high = inverse(high.step);
      const float (*w)[16] = w_ + 2 * kGroup * pair;
      auto both = [&](int j) {
        return V::or_i(V::to_i(level(V::load(w[j]), low.low, inv_low)),
                       V::template shl<4>(V::to_i(level(V::load(w[kGroup + j]), high.low, inv_high))));
      };
      for (int j = 0; j < kGroup; j += 4)
        V::store_i(words[8 * pair + j / 4], V::or_i(V::or_i(both(j), V::template shl<8>(both(j + 1))),
                                                    V::or_i(V::template shl<16>(both(j + 2)), V::template shl<24>(both(j + 3)))));
    }
    for (int half = 0; half < 2; ++half) V::transpose16(words[16 * half], 64, of_block[half]);
    alignas(64) float d[16], dmin[16], scale[kGroups][16], floor[kGroups][16];
    V::store(d, d_);
    V::store(dmin, dmin_);
    for (int g = 0; g < kGroups; ++g) {
      V::store(scale[g], scale_[g]);
      V::store(floor[g], floor_[g]);
    }
    for (int b = 0; b < n; ++b, dst += kBytes) {
      std::uint16_t head[2] = {to_f16(d[b]), to_f16(dmin[b])};
      if (broken[b] || !f16_finite(head[0]) || !f16_finite(head[1])) head[0] = 0x7e00;
      std::memcpy(dst, head, 4);
      // Groups 0..3 keep their 6 bits in bytes 0..3 (scales) and 4..7 (floors). The upper two bits of those bytes are the upper bits of
      // groups 4..7, whose lower four bits share bytes 8..11.
      for (int g = 0; g < 4; ++g) {
        const int s = static_cast<int>(scale[g][b]), f = static_cast<int>(floor[g][b]);
        const int s4 = static_cast<int>(scale[g + 4][b]), f4 = static_cast<int>(floor[g + 4][b]);
        dst[4 + g] = static_cast<std::byte>(s | s4 >> 4 << 6);
        dst[8 + g] = static_cast<std::byte>(f | f4 >> 4 << 6);
        dst[12 + g] = static_cast<std::byte>((s4 & 15) | (f4 & 15) << 4);
      }
      for (int half = 0; half < 2; ++half) std::memcpy(dst + 16 + 64 * half, of_block[half][b], 64);
    }
  }
};
