// The activations, forward and backward. No fused multiply-add here: every level gives the same bits.
// Include inside the namespace of a level.

template <class V>
struct Activations {
  using F = typename V::F;

  // e^-x, held within 2^-125 and 2^126: 2^y = 2^n 2^r for y = -x log2 e, n an integer, |r| <= 1/2, and 2^r from the polynomial of degree
  // 5 with the least relative error (10^-7) and 2^0 = 1. Rounding y adds a relative error of 10^-7 |x|. Any number for NaN.
  static F exp_minus(F x) {
    const F y = V::min(V::set(126.0f), V::max(V::set(-125.0f), V::mul(x, V::set(-1.44269504f))));
    const F magic = V::set(12582912.0f);  // 1.5 * 2^23: added to y, its lowest bits are n
    const F rounded = V::add(y, magic), r = V::sub(y, V::sub(rounded, magic));
    F p = V::set(0.0013269142f);
    for (float c : {0.009671307f, 0.05550712f, 0.24022247f, 0.693147f, 1.0f}) p = V::add(V::mul(p, r), V::set(c));
    return V::as_f(V::add_i(V::as_i(p), V::template shl<23>(V::as_i(rounded))));  // n more in the exponent
  }
  // Callers multiply by x, so that NaN stays NaN.
  static F sigmoid(F x) { return V::div(V::set(1.0f), V::add(V::set(1.0f), exp_minus(x))); }

  // Every gate is f(g) = g sigmoid(q(g)), with f'(g) = s + f (1 - s) q'(g). A policy gives q and q', and the factor that up makes.
  struct Silu {
    explicit Silu(const Activation&) {}
    F q(F g) const { return g; }
    F dq(F) const { return V::set(1.0f); }
    static F factor(F u) { return u; }
  };
  struct Oai {
    explicit Oai(const Activation& a) : alpha(V::set(a.alpha)) {}
    F q(F g) const { return V::mul(alpha, g); }
    F dq(F) const { return alpha; }
    static F factor(F u) { return V::add(u, V::set(1.0f)); }
    const F alpha;
  };
  // (1 + tanh z) / 2 = sigmoid(2z), which neither cancels nor overflows. Beyond |g| = 16 the sigmoid is 0 or 1, and g^3 might be
  // infinite where it is multiplied by the zero: g is held there.
  struct GeluTanh {
    explicit GeluTanh(const Activation&) {}
    static constexpr float kA = 1.5957691216f, kB = 0.0713548163f;  // 2z = kA g + kB g^3
    static F held(F g) { return V::min(V::set(16.0f), V::max(V::set(-16.0f), g)); }
    F q(F g) const {
      g = held(g);
      return V::mul(g, V::add(V::set(kA), V::mul(V::set(kB), V::mul(g, g))));
    }
    F dq(F g) const {
      g = held(g);
      return V::add(V::set(kA), V::mul(V::set(3 * kB), V::mul(g, g)));
    }
    static F factor(F u) { return u; }
  };

  // The clamp. min and max take the second operand if either is NaN: NaN goes through.
  struct Clamp {
    explicit Clamp(const Activation& a) : high(V::set(a.limit)), low(V::set(-a.limit)), kept_high(V::set(to_float(to_bf16(a.limit)))) {}
    F gate(F g) const { return V::min(high, g); }
    F up(F u) const { return V::min(high, V::max(low, u)); }
    // What the way back gets to see: a value that the clamp holds is moved outwards, or its rounding to bf16 might end on the limit.
    F kept_gate(F g) const { return outwards(g, g); }
    F kept_up(F u) const { return outwards(u, V::abs(u)); }
    F outwards(F x, F size) const {  // by 2^-7 of it where the sign of limit - size says so
      const F step = V::as_f(V::and_i(V::template sar<31>(V::as_i(V::sub(high, size))), 0x3c000000));
      return V::add(x, V::mul(x, step));
    }
    // 1 where the clamp left a kept value as it is, 0 where it held it.
    F gate_slope(F g) const { return within(g, kept_high); }
    F up_slope(F u) const { return within(V::abs(u), kept_high); }
    // 1 where x <= limit, else 0: made of the sign of limit - x.
    static F within(F x, F limit) { return V::to_f(V::add_i(V::template sar<31>(V::as_i(V::sub(limit, x))), V::set_i(1))); }
    const F high, low, kept_high;
  };

  template <class Gate>
  static void gated(const Activation& a, const float* c, int m, int n_panels, bf16* h, std::ptrdiff_t ld_h, bf16* gate_up,
                    std::ptrdiff_t ld_gate_up) {
    const Gate gate(a);
    const Clamp clamp(a);
    for (int p = 0; p < n_panels; ++p, c += c_block_floats(m))
      for (int r = 0; r < m; ++r) {
        const F g0 = V::load(c + r * kPanelColumns), u0 = V::load(c + r * kPanelColumns + 16), g = clamp.gate(g0);
        V::store_bf16(h + r * ld_h + 16 * p, V::mul(V::mul(g, sigmoid(gate.q(g))), Gate::factor(clamp.up(u0))));
        if (!gate_up) continue;
        V::store_bf16(gate_up + r * ld_gate_up + kPanelColumns * p, clamp.kept_gate(g0));
        V::store_bf16(gate_up + r * ld_gate_up + kPanelColumns * p + 16, clamp.kept_up(u0));
      }
  }

  template <class Gate>
  static void gated_backward(const Activation& a, const float* dh, int m, int n_panels, const bf16* gate_up, std::ptrdiff_t ld_gate_up,
                             const float* weight, bf16* dgate_up, std::ptrdiff_t ld_dgate_up, bf16* h, std::ptrdiff_t ld_h, float* dot) {
    const Gate gate(a);
    const Clamp clamp(a);
    for (int r = 0; r < m; ++r) {
      F sum = V::set(0.0f);
      for (int p = 0; p < n_panels; ++p) {
        const F d = V::load(dh + static_cast<std::size_t>(p / 2) * c_block_floats(m) + r * kPanelColumns + 16 * (p % 2));
        const bf16* gu = gate_up + r * ld_gate_up + kPanelColumns * p;
        const F g0 = V::load_bf16(gu), u0 = V::load_bf16(gu + 16), g = clamp.gate(g0), factor = Gate::factor(clamp.up(u0));
        const F s = sigmoid(gate.q(g)), f = V::mul(g, s), act = V::mul(f, factor);
        V::store_bf16(h + r * ld_h + 16 * p, act);
        sum = V::add(sum, V::mul(act, d));
        const F dw = V::mul(d, V::set(weight[r]));
        const F slope = V::add(s, V::mul(V::mul(f, V::sub(V::set(1.0f), s)), gate.dq(g)));
        bf16* out = dgate_up + r * ld_dgate_up + kPanelColumns * p;
        V::store_bf16(out, V::mul(V::mul(V::mul(dw, factor), slope), clamp.gate_slope(g0)));
        V::store_bf16(out + 16, V::mul(V::mul(dw, f), clamp.up_slope(u0)));
      }
      dot[r] += V::hsum(sum);
    }
  }

  static void relu2(const float* c, int m, int n_panels, bf16* h, std::ptrdiff_t ld_h, bf16* up, std::ptrdiff_t ld_up) {
    for (int p = 0; p < n_panels; ++p, c += c_block_floats(m))
      for (int r = 0; r < m; ++r)
        for (int j = 0; j < kPanelColumns; j += 16) {
          const F u = V::load(c + r * kPanelColumns + j), positive = V::max(V::set(0.0f), u);
          V::store_bf16(h + r * ld_h + kPanelColumns * p + j, V::mul(positive, positive));
          if (up) V::store_bf16(up + r * ld_up + kPanelColumns * p + j, u);
        }
  }

  static void relu2_backward(const float* dh, int m, int n_panels, const bf16* up, std::ptrdiff_t ld_up, const float* weight, bf16* dup,
                             std::ptrdiff_t ld_dup, bf16* h, std::ptrdiff_t ld_h, float* dot) {
    for (int r = 0; r < m; ++r) {
      F sum = V::set(0.0f);
      for (int j = 0; j < n_panels * kPanelColumns; j += 16) {
        const F d = V::load(dh + static_cast<std::size_t>(j / kPanelColumns) * c_block_floats(m) + r * kPanelColumns + j % kPanelColumns);
        const F positive = V::max(V::set(0.0f), V::load_bf16(up + r * ld_up + j)), act = V::mul(positive, positive);
        V::store_bf16(h + r * ld_h + j, act);
        sum = V::add(sum, V::mul(act, d));
        V::store_bf16(dup + r * ld_dup + j, V::mul(V::mul(d, V::set(weight[r])), V::add(positive, positive)));
      }
      dot[r] += V::hsum(sum);
    }
  }

  static void activate(const Activation& a, const float* c, int m, int n_panels, bf16* h, std::ptrdiff_t ld_h, bf16* gate_up,
                       std::ptrdiff_t ld_gate_up) {
    switch (a.kind) {
      case Activation::silu:
        return gated<Silu>(a, c, m, n_panels, h, ld_h, gate_up, ld_gate_up);
      case Activation::oai:
        return gated<Oai>(a, c, m, n_panels, h, ld_h, gate_up, ld_gate_up);
      case Activation::gelu_tanh:
        return gated<GeluTanh>(a, c, m, n_panels, h, ld_h, gate_up, ld_gate_up);
      case Activation::relu2:
        return relu2(c, m, n_panels, h, ld_h, gate_up, ld_gate_up);
    }
  }

  static void activate_backward(const Activation& a, const float* dh, int m, int n_panels, const bf16* gate_up, std::ptrdiff_t ld_gate_up,
                                const float* weight, bf16* dgate_up, std::ptrdiff_t ld_dgate_up, bf16* h, std::ptrdiff_t ld_h, float* dot) {
    switch (a.kind) {
      case Activation::silu:
        return gated_backward<Silu>(a, dh, m, n_panels, gate_up, ld_gate_up, weight, dgate_up, ld_dgate_up, h, ld_h, dot);
      case Activation::oai:
        return gated_backward<Oai>(a, dh, m, n_panels, gate_up, ld_gate_up, weight, dgate_up, ld_dgate_up, h, ld_h, dot);
      case Activation::gelu_tanh:
        return gated_backward<GeluTanh>(a, dh, m, n_panels, gate_up, ld_gate_up, weight, dgate_up, ld_dgate_up, h, ld_h, dot);
      case Activation::relu2:
        return relu2_backward(dh, m, n_panels, gate_up, ld_gate_up, weight, dgate_up, ld_dgate_up, h, ld_h, dot);
    }
  }
};
