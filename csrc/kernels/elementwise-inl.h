// Packing, quantisation, biases, and the sums over experts. No fused multiply-add here: every level gives the same bits.
// Include inside the namespace of a level, after gemm-inl.h.

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

  // max |x|; *poison becomes NaN if any element is not finite. Without their sign, bf16 numbers compare as 16-bit integers do, those
  // that are not finite above all others.
  static float max_abs(const bf16* x, int n, float* poison) {
    typename V::I most = V::set_i(0);
    for (int j = 0; j < n; j += 32) most = V::max16(most, V::and_i(load_pairs<V>(x, j, n), 0x7fff7fff));
    const F even = even_floats(most), odd = odd_floats(most);
    *poison = V::hsum(V::add(V::mul(even, V::set(0.0f)), V::mul(odd, V::set(0.0f))));
    return V::hmax(V::max(even, odd));
  }

  // bf16 pairs as floats.
  static F even_floats(typename V::I pairs) { return V::as_f(V::template shl<16>(pairs)); }
  static F odd_floats(typename V::I pairs) { return V::as_f(V::and_i(pairs, static_cast<std::int32_t>(0xffff0000u))); }

  static void quantize(const bf16* x, int n, float scale, std::int8_t* dst) {
    const bool usable = scale > 0.0f && scale <= 3.4e38f;
    for (int j = 0; j < n; j += 16) {
      alignas(16) std::int8_t q[16] = {};
      if (usable) {
        const F level = V::div(load_row<V>(x, j, n), V::set(scale));
        V::store_s8(q, V::to_i(V::min(V::max(level, V::set(-127.0f)), V::set(127.0f))));
      }
      std::memcpy(dst + j, q, static_cast<std::size_t>(n - j < 16 ? n - j : 16));
    }
  }

  static void quantize_rows(RowSource rows, int m, int k, std::int8_t* dst, std::ptrdiff_t ld, float* scale) {
    for (int r = 0; r < m; ++r, dst += ld) {
      const bf16* x = rows.row<bf16>(r);
      scale[r] = row_scale(x, k);
      // Weights are divided by their scale, once and for all; dividing every number here would take most of the time.
      const F inverse = V::set(scale[r] > 0.0f ? 1.0f / scale[r] : 0.0f);
      auto round = [&](F v) { return V::to_i(V::mul(v, inverse)); };  // |v| <= 127 scale
      int j = 0;
      for (; j + 32 <= k; j += 32) {
        const typename V::I pairs = V::load_i(x + j);
        V::store_s8_pairs(dst + j, round(even_floats(pairs)), round(odd_floats(pairs)));
      }
      std::memset(dst + j, 0, static_cast<std::size_t>(ld - j));
      if (j < k) {
        alignas(32) std::int8_t tail[32];
        const typename V::I pairs = load_pairs<V>(x, j, k);
        V::store_s8_pairs(tail, round(even_floats(pairs)), round(odd_floats(pairs)));
        std::memcpy(dst + j, tail, static_cast<std::size_t>(k - j));
      }
      if (!(scale[r] > 0.0f)) std::memset(dst, 0, static_cast<std::size_t>(ld));
    }
  }

  // --- biases ---

  static void add_bias(float* c, int m, int n_blocks, const float* bias) {
    for (int b = 0; b < n_blocks; ++b, c += c_block_floats(m), bias += kPanelColumns) {
      const F first = V::load(bias), second = V::load(bias + 16);
      for (int r = 0; r < m; ++r) {
        float* row = c + r * kPanelColumns;
        V::store(row, V::add(V::load(row), first));
        V::store(row + 16, V::add(V::load(row + 16), second));
      }
    }
  }

  static void dot_rows(RowSource rows, int m, const float* v, int n, float* dot) {
    for (int r = 0; r < m; ++r) {
      F sum = V::set(0.0f);
      for (int j = 0; j < n; j += 16) sum = V::add(sum, V::mul(load_row<V>(rows.row<bf16>(r), j, n), V::load(v + j)));
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

  static void stream_rows(const float* c, int m, int n_blocks, bf16* dst, std::ptrdiff_t ld) {
    for (int b = 0; b < n_blocks; ++b, c += c_block_floats(m))
      for (int r = 0; r < m; ++r)
        for (int j = 0; j < kPanelColumns; j += 16)
          V::stream_bf16(dst + r * ld + kPanelColumns * b + j, V::load(c + r * kPanelColumns + j));
  }

  static void combine(const float* rows, std::ptrdiff_t ld, const std::int32_t* row_of, const float* weight, int top_k, int n, float* sum) {
    combine_rows([&](std::ptrdiff_t at) { return V::load(rows + at); }, ld, row_of, weight, top_k, n, sum);
  }
  static void combine_bf16(const bf16* rows, std::ptrdiff_t ld, const std::int32_t* row_of, const float* weight, int top_k, int n,
                           float* sum) {
    combine_rows([&](std::ptrdiff_t at) { return V::load_bf16(rows + at); }, ld, row_of, weight, top_k, n, sum);
  }
  template <class Load>
  static inline __attribute__((always_inline)) void combine_rows(Load load, std::ptrdiff_t ld, const std::int32_t* row_of,
                                                                 const float* weight, int top_k, int n, float* sum) {
    for (int j = 0; j < n; j += 32) {
      F a = V::set(0.0f), b = a;
      for (int s = 0; s < top_k; ++s) {
        if (row_of[s] < 0) continue;
        const std::ptrdiff_t at = row_of[s] * ld + j;
        const F w = V::set(weight ? weight[s] : 1.0f);
        a = V::add(a, V::mul(w, load(at)));
        b = V::add(b, V::mul(w, load(at + 16)));
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
};
