// Vector GEMMs on VK tiles, all through mac(): forward, backward from the same bytes, and the outer products of LoRA gradients.
//
// Operand (pack_operand, pack_grad_operand, pack_outer_operand): groups of V::kRows rows, each [word][row of the group], the last
// group narrower; for int8 followed by the row scales and 128 * (row sums).
// Include inside the namespace of a level, after mac-inl.h.

template <class V, class Int8Dot>
struct VectorGemm {
  using F = typename V::F;
  static constexpr int kMaxBlockRows = 256;

  // So few rows of int4 (portable: and of block formats) are multiplied from registers; for more, weights are unpacked into cache.
  static constexpr int kFewRows = 2;
  using Int8Few = std::conditional_t<V::kSignedBytes, Int8SignDot<V>, Int8Dot>;
  template <class Fmt>
  using BlockFew = std::conditional_t<std::is_same_v<Fmt, Fp8Format>, Fp8Dot<V>, BlockDot<V, Fmt>>;  // for Dot::kMostRows rows

  static bool int8_products(WeightFormat format) { return format_info(format).direct == WeightFormat::int8; }
  static std::size_t words_per_row(WeightFormat format, int k) {
    const FormatInfo& info = format_info(format);
    const int rows64 = ceil_div(k, info.k_step) * direct_steps(info) * 16;
    return static_cast<std::size_t>(rows64) * (int8_products(format) ? Int8Dot::words : Bf16Dot<V>::words);
  }

  // --- operands ---

  static std::size_t operand_bytes(WeightFormat format, int m, int k) {
    const std::size_t rows = static_cast<std::size_t>(m);
    return rows * (words_per_row(format, k) * 4 + 8);  // 8: the scale and offset of int8, the power of two of FP8
  }

  // fp32 words [group][column][row of the group], `padded` columns (a multiple of 16), each times column_scale if given.
  static void pack_floats(RowSource rows, const float* column_scale, int m, int columns, int padded, float* dst) {
    for (int r0 = 0; r0 < m; r0 += V::kRows) {
      const int n = m - r0 < V::kRows ? m - r0 : V::kRows;
      for (int j = 0; j < padded; j += 16) {
        float x[V::kRows][16];
        for (int r = 0; r < n; ++r) {
          F v = load_row<V>(rows.row<bf16>(r0 + r), j, columns);
          if (column_scale) v = V::mul(v, V::load(column_scale + j));
          V::store(x[r], v);
        }
        for (int i = 0; i < 16; ++i)
          for (int r = 0; r < n; ++r) *dst++ = x[r][i];
      }
    }
  }

  static void pack_operand(WeightFormat format, RowSource rows, const float* row_scale, int m, int k, std::byte* dst) {
    const int padded = round_up(k, format_info(format).k_step);
    switch (format) {
#define KTMOE_FORMAT(id, traits) \
  case WeightFormat::id:         \
    break;
#define KTMOE_BLOCK_FORMAT(id, traits)                                                                         \
  case WeightFormat::id:                                                                                       \
    if constexpr (!V::kPlainLoops)                                                                             \
      if (m <= BlockFew<traits>::kMostRows) return RowGroups<BlockFew<traits>>::pack(rows, m, k, padded, dst); \
    break;
#include "format/formats.inc"
#undef KTMOE_FORMAT
    }
    if (!int8_products(format)) {
      pack_floats(rows, nullptr, m, k, padded, reinterpret_cast<float*>(dst));
      return;
    }
    if (format == WeightFormat::int4 && m <= kFewRows) return pack_few_int4(rows, row_scale, m, k, padded, dst);
    if (m <= kFewRows)
      pack_int8<Int8Few>(format, rows, row_scale, m, k, padded, dst);
    else
      pack_int8<Int8Dot>(format, rows, row_scale, m, k, padded, dst);
  }

  template <class Dot>
  static void pack_int8(WeightFormat format, RowSource rows, const float* row_scale, int m, int k, int padded, std::byte* dst) {
    auto* words = reinterpret_cast<std::uint32_t*>(dst);
    auto* scale = reinterpret_cast<float*>(words + static_cast<std::size_t>(m) * words_per_row(format, k));
    auto* offset = reinterpret_cast<std::int32_t*>(scale + m);
    for (int r0 = 0; r0 < m; r0 += V::kRows) {
      const int n = m - r0 < V::kRows ? m - r0 : V::kRows;
      for (int r = 0; r < n; ++r) {
        const std::int8_t* x = rows.row<std::int8_t>(r0 + r);
        std::int32_t sum = 0;
        std::uint32_t* w = words + r;
        for (int q = 0; q < padded / 4; ++q) {
          Dot::pack(x + 4 * q, w, w + n);
          w += Dot::words * n;
          sum += x[4 * q] + x[4 * q + 1] + x[4 * q + 2] + x[4 * q + 3];
        }
        scale[r0 + r] = row_scale[rows.index ? rows.index[r0 + r] : r0 + r];
        offset[r0 + r] = Dot::unsigned_weights ? 128 * sum : 0;
      }
      words += static_cast<std::size_t>(n) * words_per_row(format, k);
    }
  }

  // What mac_int4 reads, in the place of the words; the scales lie where they always do.
  static void pack_few_int4(RowSource rows, const float* row_scale, int m, int k, int padded, std::byte* dst) {
    auto* words = reinterpret_cast<std::uint32_t*>(dst);
    std::uint32_t* minus_sum = words + padded / 4 * m;
    auto* scale = reinterpret_cast<float*>(words + static_cast<std::size_t>(m) * words_per_row(WeightFormat::int4, k));
    auto* offset = reinterpret_cast<std::int32_t*>(scale + m);
    for (int r = 0; r < m; ++r) {
      const std::int8_t* x = rows.row<std::int8_t>(r);
      for (int q = 0; q < padded / 4; ++q) std::memcpy(words + q * m + r, x + 4 * q, 4);
      for (int b = 0; b < padded / Int4Format::block; ++b) {
        int sum = 0;
        for (int i = 0; i < Int4Format::block; ++i) sum += x[Int4Format::block * b + i];
        minus_sum[b * m + r] = static_cast<std::uint16_t>(-sum);
      }
      scale[r] = row_scale[rows.index ? rows.index[r] : r];
      offset[r] = 0;
    }
  }

  static std::size_t grad_operand_bytes(int m, int n_panels) {
    return static_cast<std::size_t>(m) * static_cast<std::size_t>(n_panels) * kPanelColumns * 4;
  }
  static void pack_grad_operand(RowSource dy, const float* column_scale, int m, int columns, int n_panels, std::byte* dst) {
    pack_floats(dy, column_scale, m, columns, n_panels * kPanelColumns, reinterpret_cast<float*>(dst));
  }
  static std::size_t outer_operand_bytes(int m, int p_columns) {
    return static_cast<std::size_t>(round_up(m, 16)) * static_cast<std::size_t>(p_columns) * 4;
  }
  // The transposed roles of pack_floats: groups of columns of P, [row of P][column of the group], rows padded to 16 with zeros.
  static void pack_outer_operand(const bf16* p, std::ptrdiff_t ld, int m, int p_columns, std::byte* dst) {
    auto* out = reinterpret_cast<float*>(dst);
    for (int i0 = 0; i0 < p_columns; i0 += V::kRows) {
      const int n = p_columns - i0 < V::kRows ? p_columns - i0 : V::kRows;
      for (int t = 0; t < round_up(m, 16); ++t)
        for (int i = 0; i < n; ++i) *out++ = t < m ? to_float(p[t * ld + i0 + i]) : 0.0f;
    }
  }

  // --- forward ---

  static void forward(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, bool accumulate) {
    switch (w.layout().format) {
      case WeightFormat::bf16:
        return forward_steps<Bf16Dot<V>>(operand, m, w, p0, p1, c, accumulate);
      case WeightFormat::int8:
        if (m <= kFewRows)
          forward_steps<Int8Few>(operand, m, w, p0, p1, c, false);
        else
          forward_steps<Int8Dot>(operand, m, w, p0, p1, c, false);
        return scale_int8(operand, m, w, p0, p1, c);
      case WeightFormat::int4:
        if (m <= kFewRows)
          forward_few_int4(operand, m, w, p0, p1, c);
        else
          forward_unpacked(operand, m, w, p0, p1, c);
        return scale_int8(operand, m, w, p0, p1, c);
#define KTMOE_FORMAT(id, traits)
#define KTMOE_BLOCK_FORMAT(id, traits)                                        \
  case WeightFormat::id:                                                      \
    if (forward_blocks<traits>(operand, m, w, p0, p1, c, accumulate)) return; \
    break;
#include "format/formats.inc"
#undef KTMOE_FORMAT
    }
    forward_floats(operand, m, w, p0, p1, c, accumulate);
  }

  static void forward_few_int4(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c) {
    const auto* x = reinterpret_cast<const std::uint32_t*>(operand);
    const std::uint32_t* minus_sum = x + w.layout().k_padded() / 4 * m;
    for (int p = p0; p < p1; ++p, c += c_block_floats(m)) {
      if (m == 1)
        mac_int4<V, 1>(w.panel(p), w.layout().k_steps, x, minus_sum, c, kPanelColumns);
      else
        mac_int4<V, 2>(w.panel(p), w.layout().k_steps, x, minus_sum, c, kPanelColumns);
    }
  }

  template <class Fmt>
  static bool forward_blocks(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, bool accumulate) {
    const PackedLayout& l = w.layout();
    if constexpr (V::kPlainLoops) {
      if (m > kFewRows) return false;
      const auto* x = reinterpret_cast<const float*>(operand);
      for (int p = p0; p < p1; ++p, c += c_block_floats(m))
        (m == 1 ? mac_blocks<V, Fmt, 1> : mac_blocks<V, Fmt, 2>)(w.panel(p), l.k_steps, x, c, kPanelColumns, accumulate);
    } else {
      if (m > BlockFew<Fmt>::kMostRows) return false;
      for (int p = p0; p < p1; ++p, c += c_block_floats(m))
        RowGroups<BlockFew<Fmt>>::panel(operand, m, l.k_padded(), w.panel(p), l.k_steps, c, kPanelColumns, accumulate);
    }
    return true;
  }

  // int4: each step block becomes int8 tiles once, then all rows pass by.
  static void forward_unpacked(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c) {
    alignas(64) std::byte tiles[kStepBlockBytes];
    const PackedLayout& l = w.layout();
    for (int p = p0; p < p1; ++p, c += c_block_floats(m))
      for (int s = 0; s < l.k_steps; s += kStepBlock) {
        const int steps = l.k_steps - s < kStepBlock ? l.k_steps - s : kStepBlock;
        for (int i = 0; i < 2 * steps; ++i) Unpack<V>::tile(w, p, i % 2, s + i / 2, tiles + i * kTileBytes);
        mac_rows<V, InCache<Int8Dot>>(tiles, 2 * kTileBytes, kTileBytes, 2, s, steps, reinterpret_cast<const std::uint32_t*>(operand),
                                      words_per_row(l.format, l.k), m, c, kPanelColumns, s > 0);
      }
  }

  // Block formats: the same with floats, which need no rounding to bf16 here. 128 k of a panel are 16 KB.
  static void forward_floats(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, bool accumulate) {
    constexpr int kSpans = 4, kSpanFloats = 32 * 16;
    alignas(64) float rows[2][kSpans * kSpanFloats];
    const PackedLayout& l = w.layout();
    const int all = l.k_padded() / 32;
    for (int p = p0; p < p1; ++p, c += c_block_floats(m))
      for (int s = 0; s < all; s += kSpans) {
        const int spans = all - s < kSpans ? all - s : kSpans;
        for (int i = 0; i < 2 * spans; ++i) Unpack<V>::floats(w, p, i / spans, s + i % spans, rows[i / spans] + i % spans * kSpanFloats);
        mac_rows<V, F32Dot<V>>(reinterpret_cast<const std::byte*>(rows), kTileBytes, sizeof rows[0], 2, 2 * s, 2 * spans,
                               reinterpret_cast<const std::uint32_t*>(operand), words_per_row(l.format, l.k), m, c, kPanelColumns,
                               accumulate || s > 0);
      }
  }

  template <class Dot>
  static void forward_steps(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, bool accumulate) {
    const PackedLayout& l = w.layout();
    const std::size_t words = words_per_row(l.format, l.k);
    const int block = m <= V::kRows ? l.k_steps : kStepBlock;
    for (int p = p0; p < p1; ++p)
      for (int s = 0; s < l.k_steps; s += block) {
        const int steps = l.k_steps - s < block ? l.k_steps - s : block;
        mac_rows<V, Dot>(w.tile(p, 0, s), 2 * kTileBytes, kTileBytes, 2, s, steps, reinterpret_cast<const std::uint32_t*>(operand), words,
                         m, c + static_cast<std::size_t>(p - p0) * c_block_floats(m), kPanelColumns, accumulate || s > 0);
      }
  }

  // int32 sums -> fp32, in place: (sum * row scale) * column scale.
  static void scale_int8(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c) {
    const PackedLayout& l = w.layout();
    const auto* scale = reinterpret_cast<const float*>(operand + static_cast<std::size_t>(m) * words_per_row(l.format, l.k) * 4);
    const auto* offset = reinterpret_cast<const std::int32_t*>(scale + m);
    scale_int8(scale, offset, m, w, p0, p1, c);
  }

  // The epilogue of every int8 forward; offset (or null) is what each row's sums are too large by.
  static void scale_int8(const float* scale, const std::int32_t* offset, int m, const PackedMatrix& w, int p0, int p1, float* c) {
    for (int p = p0; p < p1; ++p, c += c_block_floats(m))
      for (int r = 0; r < m; ++r)
        for (int t = 0; t < 2; ++t) {
          float* at = c + r * kPanelColumns + 16 * t;
          const F sum = V::to_f(V::sub_i(V::load_i(at), V::set_i(offset ? offset[r] : 0)));
          V::store(at, V::mul(V::mul(sum, V::set(scale[r])), V::load(w.scales() + p * kPanelColumns + 16 * t)));
        }
  }

  // --- backward ---
  // A tile is transposed and widened in L1 to rows of constant n: [tile i of the k-words][n 16][16 floats], lane j = word j of the
  // tile, so a row holds k = per_word * j + i. mac() then contracts over n; the k order is restored at the end.

  static void backward(const std::byte* operand, int m, const PackedMatrix& w, int s0, int s1, float* c, bool accumulate) {
    const int per_tile = direct_steps(format_info(w.layout().format));
    if (int8_products(w.layout().format))
      backward_steps<4>(operand, m, w, s0 * per_tile, s1 * per_tile, c, accumulate);
    else
      backward_steps<2>(operand, m, w, s0 * per_tile, s1 * per_tile, c, accumulate);
  }

  // Direct k-steps [s0, s1).
  template <int kWords>
  static void backward_steps(const std::byte* operand, int m, const PackedMatrix& w, int s0, int s1, float* c, bool accumulate) {
    constexpr int kPanels = 8 / kWords;  // a round expands 16 KB, half of a small L1
    alignas(64) std::byte expanded[kPanels * 2 * kWords * kTileBytes];
    alignas(64) float planes[kMaxBlockRows * 16 * kWords];
    const int n_panels = w.layout().n_panels;
    const std::size_t words = static_cast<std::size_t>(n_panels) * kPanelColumns;
    for (int s = s0; s < s1; ++s) {
      for (int p = 0; p < n_panels; p += kPanels) {
        const int panels = n_panels - p < kPanels ? n_panels - p : kPanels;
        for (int i = 0; i < 2 * panels; ++i)
          expand_transposed<kWords>(w, p + i / 2, i % 2, s, s + 1 < s1, expanded + static_cast<std::size_t>(i) * kWords * kTileBytes);
        mac_rows<V, F32Dot<V>>(expanded, kWords * kTileBytes, kTileBytes, kWords, 2 * p, 2 * panels,
                               reinterpret_cast<const std::uint32_t*>(operand), words, m, planes, 16 * kWords, p > 0);
      }
      for (int r = 0; r < m; ++r) {
        const float* plane = planes + r * 16 * kWords;
        restore_order<kWords>(plane, c + r * kPanelColumns, static_cast<std::ptrdiff_t>(c_block_floats(m)), accumulate);
      }
      c += c_block_floats(m) * (kWords / 2);
    }
  }

  template <int kWords>
  static void expand_transposed(const PackedMatrix& w, int p, int t, int step, bool more, std::byte* dst) {
    alignas(64) std::byte rows[kTileBytes];
    if (w.layout().format == w.layout().direct()) {
      const std::byte* tile = w.tile(p, t, step);
      if (more)  // the next k-step walks over all panels again, 2 KB further on in each: too far apart for the hardware to foresee
        for (int j = 0; j < 16; ++j) __builtin_prefetch(tile + 2 * kTileBytes + 64 * j, 0, 2);
      V::transpose16(tile, 64, rows);
    } else {
      Unpack<V>::tile(w, p, t, step, rows);
      V::transpose16(rows, 64, rows);
    }
    for (int n = 0; n < 16; ++n) {
      const auto word = V::load_i(rows + 64 * n);
      auto* out = reinterpret_cast<float*>(dst + 64 * n);
      constexpr int kPlane = kTileBytes / 4;
      if constexpr (kWords == 2) {
        V::store(out, V::as_f(V::template shl<16>(word)));
        V::store(out + kPlane, V::as_f(V::and_i(word, static_cast<std::int32_t>(0xffff0000u))));
      } else {
        V::store(out, V::to_f(V::template sar<24>(V::template shl<24>(word))));
        V::store(out + kPlane, V::to_f(V::template sar<24>(V::template shl<16>(word))));
        V::store(out + 2 * kPlane, V::to_f(V::template sar<24>(V::template shl<8>(word))));
        V::store(out + 3 * kPlane, V::to_f(V::template sar<24>(word)));
      }
    }
  }

  template <int kWords>
  static void restore_order(const float* plane, float* c, std::ptrdiff_t next_block, bool accumulate) {
    F x[4];
    if constexpr (kWords == 2) {
      V::interleave(V::load(plane), V::load(plane + 16), x[0], x[1]);
    } else {
      F even[2], odd[2];
      V::interleave(V::load(plane), V::load(plane + 32), even[0], even[1]);
      V::interleave(V::load(plane + 16), V::load(plane + 48), odd[0], odd[1]);
      V::interleave(even[0], odd[0], x[0], x[1]);
      V::interleave(even[1], odd[1], x[2], x[3]);
    }
    for (int i = 0; i < kWords; ++i) {
      float* at = c + (i / 2) * next_block + 16 * (i % 2);
      V::store(at, accumulate ? V::add(V::load(at), x[i]) : x[i]);
    }
  }

  // --- outer products ---

  static void outer(const std::byte* operand, int m, int p_columns, RowSource q, int q_tile_stride, int n_tiles, float* out,
                    std::ptrdiff_t ld_out, bool accumulate) {
    alignas(64) std::byte expanded[kMaxBlockRows * 64];
    const int steps = ceil_div(m, 16);
    for (int t = 0; t < n_tiles; ++t) {
      for (int r = 0; r < steps * 16; ++r)
        V::store(reinterpret_cast<float*>(expanded + 64 * r),
                 r < m ? V::load_bf16(q.row<bf16>(r) + static_cast<std::ptrdiff_t>(t) * q_tile_stride) : V::set(0.0f));
      mac_rows<V, F32Dot<V>>(expanded, kTileBytes, 0, 1, 0, steps, reinterpret_cast<const std::uint32_t*>(operand),
                             static_cast<std::size_t>(steps) * 16, p_columns, out + 16 * t, ld_out, accumulate);
    }
  }
};
