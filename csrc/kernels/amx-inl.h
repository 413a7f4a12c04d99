// Tile GEMMs (AMX) on the same packed bytes, written once over the tile operations of `T`: the hardware's, or software for tests.
//
//   tiles 0-3 accumulate (2 x 2), tiles 4, 5 are A, tiles 6, 7 are B; every tile is 16 rows x 64 bytes, tails are zero padded.
//   forward   A = rows of X (16 x k-step),             B = a VK tile of W as it lies in memory,     C = 16 rows x 16 columns
//   backward  A = W^T (16 k x 32 n), from two VK tiles by a lane-local blend (expand_lanes), B = dY^T, C = 16 k x 16 rows, transposed
//   outer     A = P^T (16 columns x 32 rows),          B = pairs of rows of Q,                      C = 16 x 16 of the result
// Operands that stream from L2 or beyond are loaded with the T1 hint, so that what is used again stays in L1.
// Few rows of formats that must be unpacked, and one or two on the way back, go to the vector kernels: a tile would be mostly padding.
// Include inside the namespace of a level, after gemm-inl.h.

template <class V, class T, class Vector>
struct TileGemm {
  using F = typename V::F;
  static constexpr int kFewRows = 2;    // backward
  static constexpr int kMaxTiles = 20;  // of 16 rows; 64 k-steps of so many rows take 1.25 MB of the L2
  static constexpr int kBlockRows = 16 * kMaxTiles;
  static constexpr int kPairBytes = 2 * kTileBytes;

  struct Session {  // the tile registers exist only within a kernel
    Session() { T::configure(); }
    ~Session() { T::release(); }
  };

  // Tile (i, j) of the sums, of A tile i and B tile j, in memory: at c + i * a + j * b, rows ld apart. In registers: tile 2i + j.
  struct Sums {
    float* c;
    std::ptrdiff_t a, b, ld;
  };

  // Operands of `steps` tile columns: blocks of 32 rows, each [step][row tile 0, row tile 1]; a last block of <= 16 rows has one.
  static std::size_t tiled_bytes(int m, int steps) {
    return static_cast<std::size_t>(ceil_div(m, 16)) * static_cast<std::size_t>(steps) * kTileBytes;
  }
  static int block_tiles(int m, int block) { return ceil_div(m, 16) - 2 * block < 2 ? 1 : 2; }
  static std::ptrdiff_t tile_at(int m, int steps, int row_tile, int step) {
    const int block = row_tile / 2, tiles = block_tiles(m, block);
    return ((static_cast<std::ptrdiff_t>(block) * steps * 2) + step * tiles + row_tile % 2) * kTileBytes;
  }

  // --- forward ---

  // So many rows are faster in vector registers than weights are unpacked into tiles.
  static int few_rows(WeightFormat format) {
    const FormatInfo& info = format_info(format);
    if (info.direct == format) return 0;
    return format == WeightFormat::fp8 ? 4 : format == WeightFormat::int4 ? 8 : 16;
  }
  // Whether Fp8Tiles multiplies them, and its operand is in order.
  static bool as_fp8(WeightFormat format, int m) {
    return format == WeightFormat::fp8 && m > few_rows(format) && m <= Fp8Tiles<V, TileGemm>::kMostRows;
  }
  static std::size_t operand_bytes(WeightFormat format, int m, int k) {
    if (m <= few_rows(format)) return Vector::operand_bytes(format, m, k);
    return tiled_bytes(m, direct_steps_of(format, k)) + (Vector::int8_products(format) ? static_cast<std::size_t>(m) * 4 : 0);
  }
  static int direct_steps_of(WeightFormat format, int k) {
    const FormatInfo& info = format_info(format);
    return ceil_div(k, info.k_step) * direct_steps(info);
  }

  static void pack_operand(WeightFormat format, RowSource rows, const float* row_scale, int m, int k, std::byte* dst) {
    if (m <= few_rows(format)) return Vector::pack_operand(format, rows, row_scale, m, k, dst);
    const int k_step = format_info(format_info(format).direct).k_step, steps = direct_steps_of(format, k), element = 64 / k_step;
    const bool crossed = as_fp8(format, m);
    const auto in_order = [&](typename V::I x) { return crossed ? V::cross_pairs(x) : x; };
    for (int r = 0; r < round_up(m, 16); ++r) {
      std::byte* out = dst + tile_at(m, steps, r / 16, 0) + 64 * (r % 16);
      const std::ptrdiff_t next = block_tiles(m, r / 32) * kTileBytes;
      int left = 0, s = 0;  // bytes of the row, those of whole tiles first
      if (r < m) {
        left = k * element;
        const auto row_at = [&](int i) {
          return static_cast<const std::byte*>(rows.base) + rows.ld * element * (rows.index ? rows.index[i] : i);
        };
        const std::byte* row = row_at(r);
        const std::ptrdiff_t to_next = row_at(r + 1 < m ? r + 1 : r) - row;  // asked for, as rows lie anywhere
        for (; left >= 64; ++s, left -= 64, row += 64, out += next) {
          __builtin_prefetch(row + to_next);
          V::store_i(out, in_order(V::load_i(row)));
        }
        if (left > 0) {
          alignas(64) std::byte tail[64] = {};
          std::memcpy(tail, row, static_cast<std::size_t>(left));
          V::store_i(out, in_order(V::load_i(tail)));
          ++s, out += next;
        }
      }
      for (; s < steps; ++s, out += next) std::memset(out, 0, 64);
    }
    if (!Vector::int8_products(format)) return;
    auto* scale = reinterpret_cast<float*>(dst + tiled_bytes(m, steps));
    for (int r = 0; r < m; ++r) scale[r] = row_scale[rows.index ? rows.index[r] : r];
  }

  static void forward(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, const Addend* plus,
                      const Epilogue* epilogue) {
    const PackedLayout& l = w.layout();
    if (m <= few_rows(l.format)) return forward_few(operand, m, w, p0, p1, c, plus, epilogue);
    const Session session;
    if (Vector::int8_products(l.format)) {
      const auto* scale = reinterpret_cast<const float*>(operand + tiled_bytes(m, direct_steps_of(l.format, l.k)));
      const auto scaled = [&](float* at, const float* more, int row, int rows, int p) {
        Vector::scale_int8(scale + row, nullptr, rows, w, p, p + 1, at);
        if (more) add_rows(at, more, rows);
        if (epilogue) epilogue->take(epilogue->context, at, row, rows, p);
      };
      multiply<true>(operand, m, w, p0, p1, c, plus, !epilogue, scaled);
    } else {
      const auto finished = [&](float* at, const float*, int row, int rows, int p) {
        if (epilogue) epilogue->take(epilogue->context, at, row, rows, p);
      };
      if (as_fp8(l.format, m)) return Fp8Tiles<V, TileGemm>::multiply(operand, m, w, p0, p1, c, plus, finished);
      multiply<false>(operand, m, w, p0, p1, c, plus, !epilogue, finished);
    }
  }

  static void add_rows(float* to, const float* more, int rows) {  // of a C block
    for (int i = 0; i < rows * kPanelColumns; i += 16) V::store(to + i, V::add(V::load(to + i), V::load(more + i)));
  }

  // What is added is in tiles all the same: its product goes to an area of its own, one panel at a time.
  static void forward_few(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, const Addend* plus,
                          const Epilogue* epilogue) {
    Vector::product(operand, m, w, p0, p1, c, false);
    alignas(64) float more[32 * kPanelColumns];  // few rows are one block
    float* at = c;
    for (int p = p0; plus && p < p1; ++p, at += c_block_floats(m)) {
      forward(plus->operand, m, plus->w, p, p + 1, more, nullptr, nullptr);
      add_rows(at, more, m);
    }
    Vector::deliver(m, p0, p1, c, epilogue);
  }

  template <bool kInt8, class Finished>
  static void multiply(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, const Addend* plus, bool keep,
                       const Finished& finished) {
    if (w.layout().format == w.layout().direct())
      multiply<kInt8, StoredTiles>(operand, m, w, p0, p1, c, plus, keep, finished);
    else
      multiply<kInt8, UnpackedTiles>(operand, m, w, p0, p1, c, plus, keep, finished);
  }

  // How often multiply_steps calls between() while all blocks of m rows pass a step of two weight tiles.
  static int turns_of_step(int m) { return ceil_div(m, 16) + 2 * ceil_div(m, 32); }

  // Pieces of work that are done between tile products: spread over the turns that there are, early rather than late.
  struct Pace {
    static constexpr int kNever = std::numeric_limits<int>::max();
    int pieces = 0, done = 0, at_once = 0, every = 0, wait = kNever;

    Pace() = default;
    Pace(int n, int turns) : pieces(n), at_once(ceil_div(n, turns)) {
      if (n > 0) wait = every = n < turns ? turns / n : 1;
    }
    template <class Piece>
    inline __attribute__((always_inline)) void turn(Piece piece) {
      if (--wait > 0) return;
      for (int i = 0; i < at_once && done < pieces; ++i) piece(done++);
      wait = done < pieces ? every : kNever;
    }
  };

  // Weights that all rows pass by before the next ones: a few panels, k-steps [s, s + steps).
  struct Visit {
    int p, panels, s, steps;
    bool beyond;  // what the caller asked for
  };

  // Tiles as they lie in memory. The next ones are asked for meanwhile: with one block of rows 8 KB ahead, in the order of memory; with
  // more, each of which reads all of a visit, the whole next visit. Into the L1 where lines come seldom enough to leave room in it.
  struct StoredTiles {
    static constexpr int kVisitPanels = 1, kVisitSteps = 64;  // 128 KB
    const PackedMatrix& w;
    const int blocks, lines;  // a turn asks for so many
    const std::byte *line = nullptr, *end = nullptr;

    StoredTiles(const PackedMatrix& matrix, int m)
        : w(matrix), blocks(ceil_div(m, 32)), lines(ceil_div(kPairBytes / 64, turns_of_step(m))) {}
    void first(const Visit&) {}
    const std::byte* at(const Visit& v, int) const { return w.tile(v.p, 0, v.s); }
    void prepare(const Visit& now, const Visit& next) {
      const Visit& asked = blocks == 1 ? now : next;
      line = end = nullptr;
      if (asked.p >= w.layout().n_panels) return;
      line = at(asked, 0) + (blocks == 1 ? 8192 : 0);
      end = line + static_cast<std::ptrdiff_t>(asked.steps) * kPairBytes;
    }
    // A line here and there: all of a step at once cost more, above all while the core is slow (see docs/performance.md).
    inline __attribute__((always_inline)) void between() {
      for (int i = lines; i > 0 && line != end; --i, line += 64) {
        if (blocks >= kSeldom)
          __builtin_prefetch(line, 0, 3);
        else
          __builtin_prefetch(line, 0, 2);
      }
    }
    void after() {}
    void turn() {}

   private:
    static constexpr int kSeldom = 4;  // blocks
  };

  // Tiles that are unpacked once for all rows, those of the next visit while this one is multiplied.
  struct UnpackedTiles {
    static constexpr int kVisitPanels = 2, kVisitSteps = 32;
    const PackedMatrix& w;
    const int blocks;
    Pace pace;
    Visit next{};
    int p = 0, s = 0, t = 0;  // the next piece: a tile
    std::byte* to = nullptr;
    bool odd = false;
    alignas(64) std::byte tiles[2][static_cast<std::size_t>(kVisitPanels) * kVisitSteps * kPairBytes];

    UnpackedTiles(const PackedMatrix& matrix, int m) : w(matrix), blocks(ceil_div(m, 32)) {}
    void first(const Visit& v) {
      prepare(v, v);
      for (int i = pace.pieces; i > 0; --i) piece();
      turn();
    }
    const std::byte* at(const Visit& v, int panel) const { return tiles[!odd] + panel * v.steps * kPairBytes; }
    void prepare(const Visit& now, const Visit& v) {
      next = v, p = v.p, s = v.s, t = 0, to = tiles[odd];
      pace = {v.beyond ? 0 : v.panels * v.steps * 2, blocks * now.panels * now.steps};
    }
    void between() {}
    // Loads that come soon after its stores would wait for them, hence not between loads.
    inline __attribute__((always_inline)) void after() {
      pace.turn([&](int) { piece(); });
    }
    void piece() {
      Unpack<V>::tile(w, p, t, s, to);
      to += kTileBytes;
      if ((t ^= 1)) return;
      if (++s == next.s + next.steps) s = next.s, ++p;
    }
    void turn() { odd = !odd; }
  };

  // C blocks of 32 rows x a few panels on their way out, a slice between tile products at a time.
  template <class Finished>
  struct Delivery {
    static constexpr int kRows = 2;  // of a slice
    const Finished& finished;
    float* c = nullptr;
    const float* more = nullptr;  // to be added, or null; its panels follow each other
    std::ptrdiff_t floats = 0;    // of c between panels
    int first_row = 0, rows = 0, at = 0, p = 0, p1 = 0;
    Pace pace{};

    void begin(float* blocks, std::ptrdiff_t between, const float* addend, int row, int n_rows, int panel, int panels, int turns) {
      rest();
      c = blocks, more = addend, floats = between, first_row = row, rows = n_rows, at = 0, p = panel, p1 = panel + panels;
      pace = {panels * ceil_div(n_rows, kRows), turns};
    }
    void slice() {
      take(rows - at < kRows ? rows - at : kRows);
      if ((at += kRows) >= rows) next();
    }
    void take(int n) { finished(c + at * kPanelColumns, more ? more + at * kPanelColumns : nullptr, first_row + at, n, p); }
    void next() {
      at = 0, ++p, c += floats;
      if (more) more += 32 * kPanelColumns;
    }
    inline __attribute__((always_inline)) void between() {
      pace.turn([&](int) { slice(); });
    }
    void rest() {
      for (; p < p1; next()) take(rows - at);
    }
  };

  // All rows times panels [p0, p1). keep: finished blocks stay in c; otherwise they need not, and most of them never get there.
  // The rows, in blocks of 32, pass by one visit of weights after the other. Both stream from the L2, all k-steps of a visit at a time: a
  // smaller part of one of them would stay in L1, but then sums would have to come and go more often, which costs more (see
  // docs/performance.md). Meanwhile the weights of the next visit are got ready, and finished blocks go to `finished`.
  template <bool kInt8, class Weights, class Finished>
  static void multiply(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, const Addend* plus, bool keep,
                       const Finished& finished) {
    constexpr int kBlock = 32 * kPanelColumns, kPanels = Weights::kVisitPanels;
    alignas(64) float ring[2][kPanels * kBlock], more[kInt8 ? 2 : 1][kInt8 ? kPanels * kBlock : 1];
    const int steps = direct_steps_of(w.layout().format, w.layout().k), blocks = ceil_div(m, 32);
    const int visit_steps = ceil_div(steps, ceil_div(steps, Weights::kVisitSteps));
    const auto c_floats = static_cast<std::ptrdiff_t>(c_block_floats(m));
    const auto visit_at = [&](int p, int s) {
      return Visit{p, p1 - p < kPanels ? p1 - p : kPanels, s, steps - s < visit_steps ? steps - s : visit_steps, p >= p1};
    };
    const auto after = [&](const Visit& v) {
      if (v.p + v.panels < p1) return visit_at(v.p + v.panels, v.s);
      return v.s + v.steps < steps ? visit_at(p0, v.s + v.steps) : visit_at(p1, 0);
    };
    Weights weights(w, m);
    Delivery<Finished> out{finished};
    const auto between = [&] {
      weights.between();
      out.between();
    };
    const auto after_step = [&] { weights.after(); };
    const Meanwhile meanwhile{between, after_step};
    int turn = 0;
    Visit visit = visit_at(p0, 0);
    weights.first(visit);
    for (; !visit.beyond; weights.turn()) {
      const Visit next = after(visit);
      const bool last = visit.s + visit.steps == steps, through_ring = last && !keep;
      weights.prepare(visit, next);
      for (int block = 0; block < blocks; ++block) {
        turn ^= 1;
        float* area = c + (visit.p - p0) * c_floats + block * kBlock;
        float* sums = through_ring ? ring[turn] : area;
        const std::ptrdiff_t floats = through_ring ? kBlock : c_floats;
        const int tiles = block_tiles(m, block);
        const std::byte* a = operand + tile_at(m, steps, 2 * block, visit.s);
        for (int i = 0; i < visit.panels; ++i) {
          // What is added comes first, where sums can go on from it, or has sums of its own, which meet the others when they are finished.
          const Run run{a, weights.at(visit, i), visit.steps};
          const Run addend = plus && (kInt8 ? last : visit.s == 0) ? run_of(*plus, m, block, visit.p + i) : Run{};
          block_product<kInt8>(tiles, kInt8 ? Run{} : addend, run, visit.s > 0 ? area + i * c_floats : nullptr, sums + i * floats,
                               meanwhile);
          if constexpr (kInt8)
            if (addend.n) block_product<false>(tiles, {}, addend, nullptr, more[turn] + i * kBlock, Idle{});
        }
        if (last)
          out.begin(sums, floats, kInt8 && plus ? more[turn] : nullptr, 32 * block, m - 32 * block < 32 ? m - 32 * block : 32, visit.p,
                    visit.panels, (tiles + 2) * visit.panels * visit.steps);
      }
      visit = next;
    }
    out.rest();
  }

  // n k-steps of 32 rows x one panel: where their tiles begin.
  struct Run {
    const std::byte *a = nullptr, *b = nullptr;
    int n = 0;
  };
  static Run run_of(const Addend& plus, int m, int block, int p) {
    const int steps = plus.w.layout().k_steps;
    return {plus.operand + tile_at(m, steps, 2 * block, 0), plus.w.panel(p), steps};
  }

  // to = from (null: zero) + the product of `before`, in bf16, + that of `run`, with one or two tiles of rows. meanwhile: while
  // `run` is multiplied.
  template <bool kInt8, class M>
  static inline __attribute__((always_inline)) void block_product(int tiles, const Run& before, const Run& run, const float* from,
                                                                  float* to, M meanwhile) {
    if (tiles == 2)
      row_product<kInt8, 2>(before, run, from, to, meanwhile);
    else
      row_product<kInt8, 1>(before, run, from, to, meanwhile);
  }
  template <bool kInt8, int kA, class M>
  static inline __attribute__((always_inline)) void row_product(const Run& before, const Run& run, const float* from, float* to,
                                                                M meanwhile) {
    constexpr std::ptrdiff_t kNextRows = 16 * kPanelColumns, kNextColumns = 16;
    if (from)
      load_sums<kA, 2>({const_cast<float*>(from), kNextRows, kNextColumns, kPanelColumns});
    else
      zero_sums<kA, 2>();
    if constexpr (!kInt8)
      multiply_steps<false, kA, 2, true>(before.a, kA * kTileBytes, kTileBytes, before.b, kPairBytes, kTileBytes, before.n, Idle{});
    multiply_steps<kInt8, kA, 2, true>(run.a, kA * kTileBytes, kTileBytes, run.b, kPairBytes, kTileBytes, run.n, meanwhile);
    store_sums<kA, 2>({to, kNextRows, kNextColumns, kPanelColumns});
  }

  template <int t, bool kStream>
  static inline __attribute__((always_inline)) void load_tile(const std::byte* p) {
    if constexpr (kStream)
      T::template load_streamed<t>(p, 64);
    else
      T::template load<t>(p, 64);
  }

  template <int kA, int kB>
  static inline __attribute__((always_inline)) void zero_sums() {
    T::template zero<0>();
    if constexpr (kB == 2) T::template zero<1>();
    if constexpr (kA == 2) T::template zero<2>();
    if constexpr (kA == 2 && kB == 2) T::template zero<3>();
  }
  template <int kA, int kB>
  static inline __attribute__((always_inline)) void load_sums(const Sums& at) {
    T::template load<0>(at.c, 4 * at.ld);
    if constexpr (kB == 2) T::template load<1>(at.c + at.b, 4 * at.ld);
    if constexpr (kA == 2) T::template load<2>(at.c + at.a, 4 * at.ld);
    if constexpr (kA == 2 && kB == 2) T::template load<3>(at.c + at.a + at.b, 4 * at.ld);
  }
  template <int kA, int kB>
  static inline __attribute__((always_inline)) void store_sums(const Sums& at) {
    T::template store<0>(at.c, 4 * at.ld);
    if constexpr (kB == 2) T::template store<1>(at.c + at.b, 4 * at.ld);
    if constexpr (kA == 2) T::template store<2>(at.c + at.a, 4 * at.ld);
    if constexpr (kA == 2 && kB == 2) T::template store<3>(at.c + at.a + at.b, 4 * at.ld);
  }

  // Work for the rest of the core while tiles are multiplied, 16 cycles each: between() comes after each of a step's kA + kB loads, after()
  // at the end of a step.
  template <class Between, class After>
  struct Meanwhile {
    Between between;
    After after;
  };
  using Idle = Meanwhile<Nothing, Nothing>;

  // Sums += A B over n steps, for kA A tiles and kB B tiles; B streams, A does (kStreamA) or is used again from L1.
  template <bool kInt8, int kA, int kB, bool kStreamA, class M>
  static inline __attribute__((always_inline)) void multiply_steps(const std::byte* a, std::ptrdiff_t a_step, std::ptrdiff_t a_tile,
                                                                   const std::byte* b, std::ptrdiff_t b_step, std::ptrdiff_t b_tile, int n,
                                                                   M meanwhile) {
    for (int s = 0; s < n; ++s, a += a_step, b += b_step) {
      T::template load_streamed<6>(b, 64);
      meanwhile.between();
      load_tile<4, kStreamA>(a);
      meanwhile.between();
      T::template multiply<kInt8, 0, 4, 6>();
      if constexpr (kA == 2) {
        load_tile<5, kStreamA>(a + a_tile);
        meanwhile.between();
        T::template multiply<kInt8, 2, 5, 6>();
      }
      if constexpr (kB == 2) {
        T::template load_streamed<7>(b + b_tile, 64);
        meanwhile.between();
        if constexpr (kA == 2) T::template multiply<kInt8, 3, 5, 7>();
        T::template multiply<kInt8, 1, 4, 7>();
      }
      meanwhile.after();
    }
  }

  // --- backward ---

  static std::size_t grad_operand_bytes(int m, int n_panels) {
    return m <= kFewRows ? Vector::grad_operand_bytes(m, n_panels) : tiled_bytes(m, n_panels);
  }

  static typename V::I zip(const bf16* even, const bf16* odd) {
    return V::zip16(reinterpret_cast<const std::uint16_t*>(even), reinterpret_cast<const std::uint16_t*>(odd));
  }

  // B tile of (16 rows, panel): row j holds for each of the rows the pair (dY[32p + j], dY[32p + 16 + j]).
  static void pack_grad_operand(RowSource dy, const float* column_scale, int m, int columns, int n_panels, std::byte* dst) {
    if (m <= kFewRows) return Vector::pack_grad_operand(dy, column_scale, m, columns, n_panels, dst);
    for (int r0 = 0; r0 < m; r0 += 16)
      for (int p = 0; p < n_panels; ++p) {
        alignas(64) std::byte pairs[kTileBytes];
        const int j = kPanelColumns * p, rows = m - r0 < 16 ? m - r0 : 16;
        for (int r = 0; r < rows; ++r) {
          const bf16* row = dy.row<bf16>(r0 + r);
          V::store_i(pairs + 64 * r, !column_scale && j + 32 <= columns ? zip(row + j, row + j + 16)
                                                                        : V::bf16_pairs(load_grad<V>(row, column_scale, j, columns),
                                                                                        load_grad<V>(row, column_scale, j + 16, columns)));
        }
        std::memset(pairs + 64 * rows, 0, static_cast<std::size_t>(64 * (16 - rows)));
        V::transpose16(pairs, 64, dst + tile_at(m, n_panels, r0 / 16, p));
      }
  }

  static void backward(const std::byte* operand, int m, const PackedMatrix& w, int s0, int s1, float* c, bool accumulate) {
    if (m <= kFewRows) return Vector::backward(operand, m, w, s0, s1, c, accumulate);
    if (s0 == s1) return;
    const bool stored = w.layout().format == w.layout().direct();
    if (!Vector::int8_products(w.layout().format)) {
      stored ? backward_as<2, true>(operand, m, w, s0, s1, c, accumulate) : backward_as<2, false>(operand, m, w, s0, s1, c, accumulate);
      return;
    }
    stored ? backward_as<4, true>(operand, m, w, s0, s1, c, accumulate) : backward_as<4, false>(operand, m, w, s0, s1, c, accumulate);
  }
  template <int kWords, bool kStored>
  static void backward_as(const std::byte* operand, int m, const PackedMatrix& w, int s0, int s1, float* c, bool accumulate) {
    const Session session;
    Backward<kWords, kStored>(operand, m, w, s0, s1, c, accumulate).run();
  }

  // A call works on one C block after the other, whose contraction over the panels is cut into rounds: the panels of a round, expanded, are
  // multiplied by block after block of 32 rows. The tile and the vector unit work at once. While a round is multiplied, the next one is
  // expanded into a second buffer, long before it is loaded (a tile load cannot take its bytes from stores that are on their way to L1);
  // and while a C block's first round is multiplied, the sums of the C block before are transposed.
  // Rounds pass over the rows forth and back by turns: the block that ends a round begins the next, and its sums stay in tiles.
  template <int kWords, bool kStored>  // numbers in a word of a direct tile; does it lie in memory
  class Backward {
   public:
    Backward(const std::byte* operand, int m, const PackedMatrix& w, int s0, int s1, float* c, bool accumulate)
        : operand_(operand),
          m_(m),
          w_(w),
          first_step_(s0 * direct_steps(format_info(w.layout().format))),
          n_panels_(w.layout().n_panels),
          c_(c),
          accumulate_(accumulate),
          c_blocks_((s1 - s0) * (format_info(w.layout().format).k_step / kPanelColumns)),
          blocks_(ceil_div(m, 32)),
          rounds_(ceil_div(n_panels_, most_panels(blocks_))) {}

    void run() {
      Round now = round(0);
      for (int i = 0; i < kPieces * now.panels; ++i) expand(now, i);
      for (int i = 0; i < c_blocks_ * rounds_; ++i) {
        const Round next = round(i + 1);
        multiply(now, next);
        now = next;
      }
      for (int i = 0; i < kTransposePieces * blocks_; ++i) transpose(c_blocks_ - 1, i);
    }

   private:
    // While a block of rows passes, L1 gets to see the round's A tiles (2 KB a panel), the block's sums (4 KB), and the block's share of
    // the next round: 2 KB of W and 2 KB of A a panel. As many panels as fit: A, which every block loads, stays in L1, and the sums, which
    // wait in L2, are loaded and stored as rarely as can be.
    static constexpr int kL1 = 32;                                                                  // KB
    static constexpr int most_panels(int blocks) { return (kL1 - 4) * blocks / (2 * blocks + 4); }  // 4, 7, 8 .. 11

    // The buffers lie whole pages apart: loads are then two steps behind the stores that look like theirs, equal in an address's low bits.
    static constexpr int kBufferBytes = round_up(most_panels(kMaxTiles / 2) * kPairBytes, 4096);
    static constexpr int kHalves = kWords / 2;             // C blocks of a direct tile: rows 8h .. 8h + 7 of an int8 one
    static constexpr int kUnpackPieces = kStored ? 0 : 2;  // the tiles of a pair
    static constexpr int kExpandPieces = 4;                // 32 or 80 vector instructions each
    static constexpr int kPieces = kUnpackPieces + kExpandPieces;
    static constexpr int kTransposePieces = 4;  // of a block of sums: its tiles
    static constexpr int kSum = 256, kNextK = kMaxTiles * kSum;

    struct Round {
      int c_block, index, panel, panels;  // index: within the C block
      std::byte* a;                       // [panel][32 k] rows of A
    };
    Round round(int i) {
      if (i == c_blocks_ * rounds_) return {};
      const int index = i % rounds_, begin = index * n_panels_ / rounds_, end = (index + 1) * n_panels_ / rounds_;
      return {i / rounds_, index, begin, end - begin, expanded_[i % 2]};
    }

    void multiply(const Round& now, const Round& next) {
      const int turns = turns_of_step(m_) * now.panels;
      Pace expansion{kPieces * next.panels, turns};
      Pace transposition{now.index == 0 && now.c_block > 0 ? kTransposePieces * blocks_ : 0, turns};
      const auto between = [&] {
        expansion.turn([&](int i) { expand(next, i); });
        transposition.turn([&](int i) { transpose(now.c_block - 1, i); });
      };
      const Meanwhile meanwhile{between, Nothing{}};
      for (int i = 0; i < blocks_; ++i) {
        const int block = now.index % 2 ? blocks_ - 1 - i : i;
        const bool first = i == 0, last = i + 1 == blocks_;
        if (block_tiles(m_, block) == 2)
          multiply_block<2>(now, block, first, last, meanwhile);
        else
          multiply_block<1>(now, block, first, last, meanwhile);
      }
    }

    // Two k tiles (A) x one or two row tiles (B, streamed); first, last: of the round.
    template <int kB, class M>
    void multiply_block(const Round& now, int block, bool first, bool last, M meanwhile) {
      const Sums sums{sums_ + 2 * block * kSum, kNextK, kSum, 16};
      if (now.index == 0)
        zero_sums<2, kB>();
      else if (!first)
        load_sums<2, kB>(sums);
      const std::byte* b = operand_ + tile_at(m_, n_panels_, 2 * block, now.panel);
      multiply_steps<false, 2, kB, false>(now.a, kPairBytes, kTileBytes, b, kB * kTileBytes, kTileBytes, now.panels, meanwhile);
      if (!last || now.index + 1 == rounds_) store_sums<2, kB>(sums);
    }

    // Piece i of making two tiles of W^T of each panel of a round.
    void expand(const Round& to, int i) {
      const int panel = i / kPieces, part = i % kPieces - kUnpackPieces;
      const int step = first_step_ + to.c_block / kHalves, half = to.c_block % kHalves;
      if constexpr (!kStored) {
        if (part < 0) return unpack(to.panel + panel, part + kUnpackPieces, step, half);
      }
      const std::byte* pair = kStored ? w_.panel(to.panel + panel) + static_cast<std::ptrdiff_t>(step) * kPairBytes : unpacked_;
      constexpr int kRows = 16 / kHalves / kExpandPieces;
      const std::byte* src = pair + 64 * kRows * (half * kExpandPieces + part);
      std::byte* dst = to.a + panel * kPairBytes + part * (kPairBytes / kExpandPieces);
      const std::byte* ahead = kStored ? pair_ahead(to.panel + panel, step) : nullptr;
      for (int r = 0; r < kRows; ++r, src += 64, dst += 64 * kWords) {
        if (ahead) {
          const std::byte* next = ahead + (src - pair);
          __builtin_prefetch(next, 0, 2);
          __builtin_prefetch(next + kTileBytes, 0, 2);
        }
        expand_lanes<V, kWords, 64>(src, src + kTileBytes, dst);  // row k holds the pairs (W[n][k] of tile a, W[n][k] of tile b)
      }
    }

    // What is asked for when the tiles of a panel and a stored step are expanded: those of a few panels ahead, and not the same panel's
    // next step, because panels often lie a power of two apart, where few of them fit into the L2 at once. Null beyond the last.
    static constexpr int kPanelsAhead = 8;
    const std::byte* pair_ahead(int panel, int step) const {
      const int next = panel + std::min(kPanelsAhead, n_panels_);
      if (next < n_panels_) return w_.tile(next, 0, step);
      return step + 1 < w_.layout().k_steps ? w_.tile(next - n_panels_, 0, step + 1) : nullptr;
    }

    // Of a direct step: all at once with the first one of a stored step.
    void ask_ahead(int panel, int step) const {
      const FormatInfo& info = format_info(w_.layout().format);
      if (step % direct_steps(info)) return;
      if (const std::byte* next = pair_ahead(panel, step / direct_steps(info)))
        for (int at = 0; at < 2 * info.tile_bytes; at += 64) __builtin_prefetch(next + at, 0, 2);
    }

    void unpack(int panel, int tile, int step, int half) {
      if (tile == 0 && half == 0) ask_ahead(panel, step);
      Unpack<V>::tile(w_, panel, tile, step, unpacked_ + tile * kTileBytes);
    }

    // Tile i of the sums of a C block, in the order of the blocks of rows: each is done before its block's new sums are stored.
    void transpose(int c_block, int i) {
      const int row_tile = i / 2, k = i % 2;
      if (16 * row_tile >= m_) return;
      alignas(64) float rows[kSum];
      V::transpose16(sums_ + k * kNextK + row_tile * kSum, 64, rows);
      float* at = c_ + static_cast<std::size_t>(c_block) * c_block_floats(m_) + 16 * row_tile * kPanelColumns + 16 * k;
      for (int r = 0; r < 16; ++r, at += kPanelColumns)
        V::store(at, accumulate_ ? V::add(V::load(at), V::load(rows + 16 * r)) : V::load(rows + 16 * r));
    }

    const std::byte* operand_;
    int m_;
    const PackedMatrix& w_;
    int first_step_;  // direct
    int n_panels_;
    float* c_;
    bool accumulate_;
    int c_blocks_, blocks_, rounds_;
    alignas(4096) std::byte expanded_[2][kBufferBytes];
    alignas(64) std::byte unpacked_[kPairBytes];
    alignas(64) float sums_[2 * kNextK];  // C^T: [k tile][row tile][16 k][16 rows]
  };

  // --- outer products ---

  static std::size_t outer_operand_bytes(int m, int p_columns) {
    return static_cast<std::size_t>(ceil_div(p_columns, 16)) * static_cast<std::size_t>(ceil_div(m, 32)) * kTileBytes;
  }

  // A tiles [16 columns of P][step of 32 rows]: row i holds P[32s .. 32s + 31][i].
  static void pack_outer_operand(const bf16* p, std::ptrdiff_t ld, int m, int p_columns, std::byte* dst) {
    for (int i0 = 0; i0 < p_columns; i0 += 16)
      for (int t0 = 0; t0 < m; t0 += 32, dst += kTileBytes) {
        alignas(64) std::byte pairs[kTileBytes];  // of rows; what is beyond m or p_columns is zero
        auto row = [&](int t) { return t < m ? load_row<V>(p + t * ld, i0, p_columns) : V::set(0.0f); };
        for (int t = t0; t < t0 + 32; t += 2)
          V::store_i(pairs + 32 * (t - t0),
                     t + 1 < m && i0 + 16 <= p_columns ? zip(p + t * ld + i0, p + (t + 1) * ld + i0) : V::bf16_pairs(row(t), row(t + 1)));
        V::transpose16(pairs, 64, dst);
      }
  }

  // Some tile columns of Q at a time become B tiles, row after row, which lie far apart: those a few rows ahead are asked for. Then they
  // meet P, two by two.
  static constexpr int kOuterTiles = 8;
  struct OuterTiles {
    alignas(64) std::byte at[kOuterTiles][kMaxTiles / 2 * kTileBytes];  // of 32 rows, one after the other
  };
  static void outer(const std::byte* operand, int m, int p_columns, RowSource q, int q_tile_stride, int n_tiles, float* out,
                    std::ptrdiff_t ld_out, bool accumulate) {
    const Session session;
    OuterTiles b;
    const int steps = ceil_div(m, 32);
    for (int first = 0; first < n_tiles; first += kOuterTiles) {
      const int tiles = n_tiles - first < kOuterTiles ? n_tiles - first : kOuterTiles;
      zip_rows(q, m, static_cast<std::ptrdiff_t>(first) * q_tile_stride, q_tile_stride, tiles, b);
      for (int i = 0; i < p_columns; i += 32) {
        const std::byte* a = operand + static_cast<std::ptrdiff_t>(i / 16) * steps * kTileBytes;
        const int rows = p_columns - i < 32 ? p_columns - i : 32;
        for (int j = 0; j < tiles; j += 2) {
          const bool two = j + 1 < tiles;
          const auto product =
              rows > 16 ? (two ? &outer_tiles<2, 2> : &outer_tiles<2, 1>) : (two ? &outer_tiles<1, 2> : &outer_tiles<1, 1>);
          product(a, b.at[j], sizeof b.at[j], steps, rows, out + i * ld_out + 16 * (first + j), ld_out, accumulate);
        }
      }
    }
  }

  // The 16 columns from `column` + i * stride on become the tiles i.
  static void zip_rows(RowSource q, int m, std::ptrdiff_t column, int stride, int tiles, OuterTiles& to) {
    constexpr int kAhead = 8;  // rows
    static constexpr std::uint16_t kZero[16] = {};
    const int per_line = stride < 32 ? 2 : 1;
    const auto row = [&](int t) { return q.row<std::uint16_t>(t) + column; };
    for (int t = 0; t < round_up(m, 32); t += 2) {
      for (int r = t + kAhead; r < t + kAhead + 2 && r < m; ++r)
        for (int i = 0; i < tiles; i += per_line) __builtin_prefetch(row(r) + i * stride);
      const auto *even = t < m ? row(t) : nullptr, *odd = t + 1 < m ? row(t + 1) : nullptr;
      for (int i = 0; i < tiles; ++i)
        V::store_i(to.at[i] + 32 * t, V::zip16(even ? even + i * stride : kZero, odd ? odd + i * stride : kZero));
    }
  }

  template <int kA, int kB>
  static void outer_tiles(const std::byte* a, const std::byte* b, std::ptrdiff_t b_tile, int steps, int rows, float* out,
                          std::ptrdiff_t ld_out, bool accumulate) {
    alignas(64) float sums[kA * 16][kB * 16];
    zero_sums<kA, kB>();
    multiply_steps<false, kA, kB, false>(a, kTileBytes, steps * kTileBytes, b, kTileBytes, b_tile, steps, Idle{});
    store_sums<kA, kB>({sums[0], kB * 256, 16, kB * 16});
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kB * 16; j += 16) {
        float* at = out + i * ld_out + j;
        const F value = V::load(sums[i] + j);
        V::store(at, accumulate ? V::add(V::load(at), value) : value);
      }
  }
};
