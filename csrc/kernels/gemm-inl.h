// Vector GEMMs on VK tiles, all through mac(): forward, backward from the same bytes, and the outer products of LoRA gradients.
//
// Operand (pack_operand, pack_grad_operand, pack_outer_operand): groups of rows (each_group<V::kRows>), each [word][row of the group]; for
// int8 followed by the row scales and 128 * (row sums).
// Include inside the namespace of a level, after mac-inl.h.

template <class V>
struct VectorGemm {
  using F = typename V::F;
  using Products = std::conditional_t<V::kBf16Pairs, Bf16Products<V>, Fp32Products<V>>;
  static constexpr int kBlockRows = kMostBlockRows;

  // What multiplies up to kMostRows rows of a block format.
  template <class Fmt>
  static auto block_dot() {
    if constexpr (std::is_same_v<Fmt, Fp8Format>)
      return std::conditional_t<V::kBf16Pairs, Fp8Pairs<V>, Fp8Dot<V>>{};
    else
      return BlockDot<V, Fmt>{};
  }
  // use(block_dot()) if the format has one that takes m rows.
  template <class Use>
  static bool with_block_dot(WeightFormat format, int m, Use use) {
    switch (format) {
#define KTMOE_FORMAT(id, traits) \
  case WeightFormat::id:         \
    break;
#define KTMOE_BLOCK_FORMAT(id, traits)              \
  case WeightFormat::id: {                          \
    const auto dot = block_dot<traits>();           \
    if (m > decltype(dot)::kMostRows) return false; \
    use(dot);                                       \
    return true;                                    \
  }
#include "format/formats.inc"
#undef KTMOE_FORMAT
    }
    return false;
  }

  static bool int8_products(WeightFormat format) { return format_info(format).direct == WeightFormat::int8; }
  // Up to so many rows of int4 are multiplied from registers; for more, weights become int8 tiles in cache.
  static constexpr int kFewInt4 = V::kVnni ? 2 * V::kRows : kMostBlockRows;
  // So many of them by Int4Blocks, which have an operand of their own: all without the registers of AVX-512, or without VNNI.
  static constexpr int kInt4BlockRows = !V::kVnni || V::kTiles == 1 ? kFewInt4 : V::kInOrder ? 2 : 0;
  static bool in_int4_blocks(WeightFormat format, int m) { return format == WeightFormat::int4 && m <= kInt4BlockRows; }

  static std::size_t words_per_row(WeightFormat format, int m, int k) {
    const FormatInfo& info = format_info(format);
    const int padded = round_up(k, info.k_step), rows64 = padded / info.k_step * direct_steps(info) * 16;
    if (in_int4_blocks(format, m)) return static_cast<std::size_t>(padded / 32 * Int4Blocks<V>::kPairWords);
    return static_cast<std::size_t>(rows64) * (int8_products(format) ? Int8Dot<V>::words : Products::Stored::words);
  }

  // --- operands ---

  static std::size_t operand_bytes(WeightFormat format, int m, int k) {
    std::size_t bytes = static_cast<std::size_t>(m) * (words_per_row(format, m, k) * 4 + 8);  // 8: the scale and offset of int8
    with_block_dot(format, m, [&](auto dot) { bytes = dot.bytes(m, round_up(k, format_info(format).k_step)); });
    return bytes;
  }

  static void pack_operand(WeightFormat format, RowSource rows, const float* row_scale, int m, int k, std::byte* dst) {
    const int padded = round_up(k, format_info(format).k_step);
    if (with_block_dot(format, m, [&](auto dot) { dot.pack(rows, m, k, padded, dst); })) return;
    if (!int8_products(format)) return Products::pack(rows, m, k, padded, dst);
    auto* scale = reinterpret_cast<float*>(dst) + static_cast<std::size_t>(m) * words_per_row(format, m, k);
    auto* offset = reinterpret_cast<std::int32_t*>(scale + m);
    for (int r = 0; r < m; ++r) scale[r] = row_scale[rows.index ? rows.index[r] : r];
    std::fill_n(offset, m, 0);
    if (in_int4_blocks(format, m)) return Int4Blocks<V>::pack(rows, m, padded, reinterpret_cast<std::uint32_t*>(dst));
    interleave_groups<V>(m, padded / 4, dst, [&](int r, int i) { return V::load_i(rows.row<std::int8_t>(r) + 64 * i); });
    if constexpr (Int8Dot<V>::unsigned_weights)
      for (int r = 0; r < m; ++r) offset[r] = 128 * sum_bytes(rows.row<std::int8_t>(r), padded);
  }

  static std::int32_t sum_bytes(const std::int8_t* x, int n) {
    auto sums = V::set_i(0);
    for (int j = 0; j < n; j += 64) sums = V::dpbusd(sums, V::set_i(0x01010101), V::load_i(x + j));
    alignas(64) std::int32_t lanes[16];
    V::store_i(lanes, sums);
    std::int32_t sum = 0;
    for (std::int32_t lane : lanes) sum += lane;
    return sum;
  }

  static std::size_t grad_words(int n_panels) { return static_cast<std::size_t>(n_panels) * kPanelColumns / Products::kPerWord; }
  static std::size_t grad_operand_bytes(int m, int n_panels) { return static_cast<std::size_t>(m) * grad_words(n_panels) * 4; }
  static void pack_grad_operand(RowSource dy, const float* column_scale, int m, int columns, int n_panels, std::byte* dst) {
    Products::pack_grad(dy, column_scale, m, columns, n_panels * kPanelColumns, dst);
  }
  static int outer_steps(int m) { return ceil_div(m, 16 * Products::kPerWord); }
  static std::size_t outer_operand_bytes(int m, int p_columns) {
    return static_cast<std::size_t>(outer_steps(m)) * 16 * static_cast<std::size_t>(p_columns) * 4;
  }
  static void pack_outer_operand(const bf16* p, std::ptrdiff_t ld, int m, int p_columns, std::byte* dst) {
    Products::pack_outer(p, ld, m, p_columns, dst);
  }

  // --- forward ---

  static void forward(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, const Addend* plus,
                      const Epilogue* epilogue) {
    const bool sums_go_on = !int8_products(w.layout().format);  // integer sums cannot go on from others
    if (plus && sums_go_on) product(plus->operand, m, plus->w, p0, p1, c, false);
    product(operand, m, w, p0, p1, c, plus && sums_go_on);
    if (plus && !sums_go_on) product(plus->operand, m, plus->w, p0, p1, c, true);
    deliver(m, p0, p1, c, epilogue);
  }
  static void deliver(int m, int p0, int p1, float* c, const Epilogue* epilogue) {
    if (!epilogue) return;
    for (int p = p0; p < p1; ++p, c += c_block_floats(m)) epilogue->take(epilogue->context, c, 0, m, p);
  }

  // accumulate adds to C: formats without scales only.
  static void product(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, bool accumulate) {
    switch (w.layout().format) {
      case WeightFormat::bf16:
        return forward_steps<typename Products::Stored>(operand, m, w, p0, p1, c, accumulate);
      case WeightFormat::int8:
        forward_steps<Int8Dot<V>>(operand, m, w, p0, p1, c, false);
        return scale_int8(operand, m, w, p0, p1, c);
      case WeightFormat::int4:
        forward_int4(operand, m, w, p0, p1, c);
        return scale_int8(operand, m, w, p0, p1, c);
      default:
        break;
    }
    if (with_block_dot(w.layout().format, m, [&](auto dot) {
          for (int p = p0; p < p1; ++p, c += c_block_floats(m))
            dot.panel(operand, m, w.layout().k_padded(), w.panel(p), w.layout().k_steps, c, kPanelColumns, accumulate);
        }))
      return;
    if constexpr (!V::kBf16Pairs) forward_floats(operand, m, w, p0, p1, c, accumulate);  // pairs have a block_dot() for all rows
  }

  static void forward_int4(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c) {
    const auto* x = reinterpret_cast<const std::uint32_t*>(operand);
    const PackedLayout& l = w.layout();
    if (m > kFewInt4) return forward_unpacked_int4(operand, m, w, p0, p1, c);
    if (in_int4_blocks(l.format, m)) {
      if constexpr (kInt4BlockRows > 0)
        for (int p = p0; p < p1; ++p, c += c_block_floats(m))
          Int4Blocks<V>::template panel<kInt4BlockRows>(w.panel(p), l.k_steps, x, m, c, kPanelColumns);
    } else if constexpr (kInt4BlockRows < kFewInt4) {
      for (int p = p0; p < p1; ++p, c += c_block_floats(m))
        each_group<V::kRows>(m, [&](int r, int n) {
          const auto run = for_rows<V::kRows>(n, [](auto rows) { return &Int4VnniDot<V, rows>::run; });
          run(w.panel(p), l.k_steps, x + r * (l.k_padded() / 4), c + r * kPanelColumns, kPanelColumns);
        });
    }
  }

  // Each step block becomes int8 tiles once, then all rows pass by.
  static void forward_unpacked_int4(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c) {
    using Dot = InCache<Int8Dot<V>>;
    alignas(64) std::byte tiles[kStepBlockBytes];
    const PackedLayout& l = w.layout();
    const int all = l.k_steps * direct_steps(format_info(l.format));
    for (int p = p0; p < p1; ++p, c += c_block_floats(m))
      for (int s = 0; s < all; s += kStepBlock) {
        const int steps = all - s < kStepBlock ? all - s : kStepBlock;
        for (int i = 0; i < 2 * steps; ++i) Unpack<V>::tile(w, p, i % 2, s + i / 2, tiles + i * kTileBytes);
        mac_rows<V, Dot>(tiles, 2 * kTileBytes, kTileBytes, 2, s, steps, reinterpret_cast<const std::uint32_t*>(operand),
                         words_per_row(l.format, m, l.k), m, c, kPanelColumns, s > 0,
                         block_after_next(w, p, s, kStepBlock, mac_turns<V, Dot>(2, steps, m)));
      }
  }

  // Block formats whose rows are not multiplied as they lie there: the same with floats. 128 k of a panel are 16 KB.
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
                               reinterpret_cast<const std::uint32_t*>(operand), words_per_row(l.format, m, l.k), m, c, kPanelColumns,
                               accumulate || s > 0, block_after_next(w, p, s, kSpans, mac_turns<V, F32Dot<V>>(2, 2 * spans, m)));
      }
  }

  // Direct steps of a panel, or of the next one, to be asked for while block s .. s + steps - 1 is multiplied. The next block is not soon
  // enough, because Unpack asks for parts of it.
  static AskInTurns block_after_next(const PackedMatrix& w, int p, int s, int steps, int turns) {
    const FormatInfo& info = format_info(w.layout().format);
    const auto bytes = [&](int n) { return std::ptrdiff_t{n} * 2 * info.tile_bytes / direct_steps(info); };
    return {w.panel(p) + bytes(s + 2 * steps), static_cast<int>(bytes(steps)), 0, 1, turns};
  }

  template <class Dot>
  static void forward_steps(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, bool accumulate) {
    const PackedLayout& l = w.layout();
    const std::size_t words = words_per_row(l.format, m, l.k);
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
    const auto* scale = reinterpret_cast<const float*>(operand) + static_cast<std::size_t>(m) * words_per_row(l.format, m, l.k);
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
  // A panel's two tiles of a k-step are transposed and widened in L1 (Products::expand): rows of constant n, lane j = word j of the
  // tile, so that part i of the words holds k = kWords * j + i. mac() then contracts over n; the k order is restored at the end.

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
    using Dot = typename Products::Cached;
    constexpr int kSteps = 2 / Products::kPerWord;   // steps of mac() in a panel
    constexpr int kPanels = 16 / (kSteps * kWords);  // a round expands 16 KB, half of a small L1
    constexpr std::size_t kPanelBytes = kSteps * kWords * kTileBytes;
    alignas(64) std::byte expanded[kPanels * kPanelBytes];
    alignas(64) float planes[kMostBlockRows * 16 * kWords];
    const int n_panels = w.layout().n_panels;
    for (int s = s0; s < s1; ++s) {
      for (int p = 0; p < n_panels; p += kPanels) {
        const int panels = n_panels - p < kPanels ? n_panels - p : kPanels;
        const bool few = kFewBack > 0 && m <= kFewBack;
        AskInTurns ask = next_round(w, p + panels, s, kPanels, few ? panels : mac_turns<V, Dot>(kWords, kSteps * panels, m));
        for (int i = 0; i < panels; ++i) {
          expand<kWords>(w, p + i, s, expanded + static_cast<std::size_t>(i) * kPanelBytes);
          if (few) ask();
        }
        const auto multiply = [&](auto between) {
          mac_rows<V, Dot>(expanded, kWords * kTileBytes, kTileBytes, kWords, kSteps * p, kSteps * panels,
                           reinterpret_cast<const std::uint32_t*>(operand), grad_words(n_panels), m, planes, 16 * kWords, p > 0, between);
        };
        few ? multiply(Nothing{}) : multiply(ask);
      }
      for (int r = 0; r < m; ++r) {
        const float* plane = planes + r * 16 * kWords;
        restore_order<kWords>(plane, c + r * kPanelColumns, static_cast<std::ptrdiff_t>(c_block_floats(m)), accumulate);
      }
      c += c_block_floats(m) * (kWords / 2);
    }
  }

  // For so few rows products take so much less than expansion that to ask meanwhile would show.
  static constexpr int kFewBack = V::kBf16Pairs ? 0 : 4;
  // The way back walks over the panels of a k-step, which lie too far apart for the hardware to foresee: it asks for the round from panel p
  // on, of `most` panels, or else for the first one of the next step. A stored step is asked for once, with its first direct step.
  static AskInTurns next_round(const PackedMatrix& w, int p, int step, int most, int turns) {
    const FormatInfo& info = format_info(w.layout().format);
    const int direct = direct_steps(info), panels = w.layout().n_panels;
    if (p >= panels) p = 0, ++step;
    if (step % direct || step / direct >= w.layout().k_steps) return {};
    const auto apart = static_cast<std::ptrdiff_t>(w.layout().panel_stride);
    return {w.tile(p, 0, step / direct), 2 * info.tile_bytes, apart, std::min(most, panels - p), turns};
  }

  template <int kWords>
  static void expand(const PackedMatrix& w, int p, int step, std::byte* dst) {
    if (w.layout().format == w.layout().direct()) return Products::template expand<kWords>(w.tile(p, 0, step), w.tile(p, 1, step), dst);
    alignas(64) std::byte tiles[2][kTileBytes];
    for (int t = 0; t < 2; ++t) Unpack<V>::tile(w, p, t, step, tiles[t]);
    Products::template expand<kWords>(tiles[0], tiles[1], dst);
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
    alignas(64) std::byte expanded[kMostBlockRows * 64 / Products::kPerWord];
    const int steps = outer_steps(m);
    for (int t = 0; t < n_tiles; ++t) {
      Products::outer_rows(q, m, static_cast<std::ptrdiff_t>(t) * q_tile_stride, expanded);
      mac_rows<V, typename Products::Cached>(expanded, kTileBytes, 0, 1, 0, steps, reinterpret_cast<const std::uint32_t*>(operand),
                                             static_cast<std::size_t>(steps) * 16, p_columns, out + 16 * t, ld_out, accumulate);
    }
  }
};
