// Packing, quantisation, SwiGLU forward and backward, and the sums over experts. No fused multiply-add here: every level gives the
// same bits. Include inside the namespace of a level, after gemm-inl.h.

template <class V>
struct Elementwise {
  using F = typename V::F;

  // --- weights ---

  static void row_scales(WeightFormat, const bf16* src, std::ptrdiff_t ld, int rows, int k, float* scale) {
    for (int r = 0; r < rows; ++r) scale[r] = row_scale(src + r * ld, k);
  }

  static void pack_tile(WeightFormat format, const bf16* src, std::ptrdiff_t ld, int rows, int columns, const float* scale,
                        std::byte* dst) {
    if (format == WeightFormat::bf16 && rows == 16 && columns == Bf16Format::k_step) {
      V::transpose16(src, ld * 2, dst);
      return;
    }
    if (format == WeightFormat::int4) return Int4Quantizer<V>::tile(src, ld, rows, columns, scale, dst);
    alignas(64) std::byte staged[kTileBytes] = {};
    for (int r = 0; r < rows; ++r) {
      if (format == WeightFormat::bf16)
        std::memcpy(staged + 64 * r, src + r * ld, 2 * static_cast<std::size_t>(columns));
      else
        quantize(src + r * ld, columns, scale[r], reinterpret_cast<std::int8_t*>(staged + 64 * r));
    }
    V::transpose16(staged, 64, dst);
  }

  // --- int8 rows ---

  // NaN for a row with an element that is not finite: it must show in every result, not become a number.
  static float row_scale(const bf16* x, int n) {
    float poison;
    const float most = max_abs(x, n, &poison);
    return poison == 0.0f ? Int8Format::scale(most) : std::numeric_limits<float>::quiet_NaN();
  }

  // max |x|; *poison becomes NaN if any element is not finite.
  static float max_abs(const bf16* x, int n, float* poison) {
    F most = V::set(0.0f), bad = V::set(0.0f);
    for (int j = 0; j < n; j += 16) {
      const F v = load(x, j, n);
      most = V::max(V::abs(v), most);
      bad = V::add(bad, V::mul(v, V::set(0.0f)));
    }
    *poison = V::hsum(bad);
    return V::hmax(most);
  }

  static void quantize(const bf16* x, int n, float scale, std::int8_t* dst) {
    const bool usable = scale > 0.0f && scale <= 3.4e38f;
    for (int j = 0; j < n; j += 16) {
      alignas(16) std::int8_t q[16] = {};
      if (usable) {
        const F level = V::div(load(x, j, n), V::set(scale));
        V::store_s8(q, V::to_i(V::min(V::max(level, V::set(-127.0f)), V::set(127.0f))));
      }
      std::memcpy(dst + j, q, static_cast<std::size_t>(n - j < 16 ? n - j : 16));
    }
  }

  static void quantize_rows(RowSource rows, int m, int k, std::int8_t* dst, std::ptrdiff_t ld, float* scale) {
    for (int r = 0; r < m; ++r, dst += ld) {
      scale[r] = row_scale(rows.row<bf16>(r), k);
      quantize(rows.row<bf16>(r), k, scale[r], dst);
      std::memset(dst + k, 0, static_cast<std::size_t>(ld - k));
    }
  }

  // --- SwiGLU ---

  // e^x for x in [-87, 88], clamped to it; NaN stays NaN. Relative error below 1e-6: x = n ln 2 + r, |r| <= 0.35, then the Taylor
  // series of e^r to the seventh power (its first omitted term is below 6e-9).
  static F exp(F x) {
    x = V::min(V::set(88.0f), V::max(V::set(-87.0f), x));
    const typename V::I n = V::to_i(V::mul(x, V::set(1.44269504f)));
    const F nf = V::to_f(n);
    F r = V::sub(x, V::mul(nf, V::set(0.693359375f)));  // ln 2 in two parts: the first product is exact
    r = V::sub(r, V::mul(nf, V::set(-2.12194440e-4f)));
    F p = V::set(1.0f / 5040);
    for (float inverse_factorial : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
      p = V::add(V::mul(p, r), V::set(inverse_factorial));
    return V::mul(p, V::as_f(V::template shl<23>(V::add_i(n, V::set_i(127)))));
  }
  static F sigmoid(F x) { return V::div(V::set(1.0f), V::add(V::set(1.0f), exp(V::sub(V::set(0.0f), x)))); }

  static void swiglu(const float* c, int m, int n_panels, bf16* h, std::ptrdiff_t ld_h, bf16* gate_up, std::ptrdiff_t ld_gate_up) {
    for (int p = 0; p < n_panels; ++p, c += c_block_floats(m))
      for (int r = 0; r < m; ++r) {
        const F g = V::load(c + r * kPanelColumns), u = V::load(c + r * kPanelColumns + 16);
        V::store_bf16(h + r * ld_h + 16 * p, V::mul(V::mul(g, sigmoid(g)), u));
        if (!gate_up) continue;
        V::store_bf16(gate_up + r * ld_gate_up + kPanelColumns * p, g);
        V::store_bf16(gate_up + r * ld_gate_up + kPanelColumns * p + 16, u);
      }
  }

  static void swiglu_backward(const float* dh, int m, int n_panels, const bf16* gate_up, std::ptrdiff_t ld_gate_up, const float* weight,
                              bf16* dgate_up, std::ptrdiff_t ld_dgate_up, bf16* h, std::ptrdiff_t ld_h, float* dot) {
    for (int r = 0; r < m; ++r) {
      F sum = V::set(0.0f);
      for (int p = 0; p < n_panels; ++p) {
        const F d = V::load(dh + static_cast<std::size_t>(p / 2) * c_block_floats(m) + r * kPanelColumns + 16 * (p % 2));
        const bf16* gu = gate_up + r * ld_gate_up + kPanelColumns * p;
        const F g = V::load_bf16(gu), u = V::load_bf16(gu + 16), s = sigmoid(g), silu = V::mul(g, s), act = V::mul(silu, u);
        V::store_bf16(h + r * ld_h + 16 * p, act);
        sum = V::add(sum, V::mul(act, d));
        const F dw = V::mul(d, V::set(weight[r]));
        // d silu(g) / dg = s + g s (1 - s)
        const F slope = V::add(s, V::mul(silu, V::sub(V::set(1.0f), s)));
        bf16* out = dgate_up + r * ld_dgate_up + kPanelColumns * p;
        V::store_bf16(out, V::mul(V::mul(dw, u), slope));
        V::store_bf16(out + 16, V::mul(dw, silu));
      }
      dot[r] += V::hsum(sum);
    }
  }

  // --- C blocks out ---

  static void c_to_bf16(const float* c, int m, int n_blocks, float factor, const float* row_factor, bf16* dst, std::ptrdiff_t ld) {
    for (int b = 0; b < n_blocks; ++b, c += c_block_floats(m))
      for (int r = 0; r < m; ++r) {
        const F f = V::set(row_factor ? factor * row_factor[r] : factor);
        for (int j = 0; j < kPanelColumns; j += 16)
          V::store_bf16(dst + r * ld + kPanelColumns * b + j, V::mul(f, V::load(c + r * kPanelColumns + j)));
      }
  }

  static void c_to_rows(const float* c, int m, int n_blocks, float* dst, std::ptrdiff_t ld) {
    for (int b = 0; b < n_blocks; ++b, c += c_block_floats(m))
      for (int r = 0; r < m; ++r) std::memcpy(dst + r * ld + kPanelColumns * b, c + r * kPanelColumns, kPanelColumns * sizeof(float));
  }

  static void combine(const float* rows, std::ptrdiff_t ld, const std::int32_t* row_of, const float* weight, int top_k, int n, float* sum) {
    for (int j = 0; j < n; j += 32) {
      F a = V::set(0.0f), b = a;
      for (int s = 0; s < top_k; ++s) {
        if (row_of[s] < 0) continue;
        const float* row = rows + row_of[s] * ld + j;
        const F w = V::set(weight ? weight[s] : 1.0f);
        a = V::add(a, V::mul(w, V::load(row)));
        b = V::add(b, V::mul(w, V::load(row + 16)));
      }
      V::store(sum + j, a);
      V::store(sum + j + 16, b);
    }
  }

  static void round_row(const float* src, int n, bf16* dst) {
    int j = 0;
    for (; j + 16 <= n; j += 16) V::store_bf16(dst + j, V::load(src + j));
    for (; j < n; ++j) dst[j] = to_bf16(src[j]);
  }

 private:
  static F load(const bf16* x, int j, int n) {
    if (j + 16 <= n) return V::load_bf16(x + j);
    bf16 tail[16] = {};
    std::memcpy(tail, x + j, 2 * static_cast<std::size_t>(n - j));
    return V::load_bf16(tail);
  }
};
