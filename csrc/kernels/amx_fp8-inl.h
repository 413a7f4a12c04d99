// FP8 weights in tiles. Every code becomes an exact bf16 number, and the scales of the columns come in once for 128 k, on sums: weights are
// not rounded, and making them takes half of the instructions that scaling each would take.
//
//   operand: as for bf16, but the four k of a word in the order 0, 2, 1, 3, as the codes of a word come apart (Fp8Codes)
// Include inside the namespace of a level, before amx-inl.h.

template <class V, class Gemm>  // Gemm: TileGemm
struct Fp8Tiles {
  static constexpr int kMostRows = 96;                   // for more, scaling the sums takes longer than scaling the weights
  static constexpr int kSteps = Fp8Format::k_step / 32;  // of tiles in a stored k-step
  static constexpr int kTile = Fp8Format::rows * kRowBytes, kCodeRows = Fp8Format::rows - Fp8Format::scale_rows;
  static constexpr int kBlock = 32 * kPanelColumns;

  // Rows of codes [i0, i1) of both tiles of a k-step, one tile after the other.
  static void unpack(const std::byte* k_step, int i0, int i1, std::byte* tiles) {
    for (int i = i0; i < i1; ++i) {
      const int t = i / kCodeRows, row = i % kCodeRows;
      const Fp8Codes<V> pairs(k_step + t * kTile + (Fp8Format::scale_rows + row) * kRowBytes);
      std::byte* to = tiles + row / 8 * Gemm::kPairBytes + t * kTileBytes + row % 8 * 2 * kRowBytes;
      V::store_i(to, pairs.even);
      V::store_i(to + kRowBytes, pairs.odd);
    }
  }

  // All rows times panels [p0, p1). While a k-step is multiplied, the next one is unpacked and the sums before are scaled: what tiles have
  // stored is not read until it has reached the L1.
  template <class Finished>
  static void multiply(const std::byte* operand, int m, const PackedMatrix& w, int p0, int p1, float* c, const Addend* plus,
                       const Finished& finished) {
    const int k_steps = w.layout().k_steps, steps = k_steps * kSteps, blocks = ceil_div(m, 32);
    alignas(64) std::byte tiles[2][kSteps * Gemm::kPairBytes];
    alignas(64) float sums[2][kBlock], more[kBlock];

    struct {
      const float* sums = nullptr;
      const std::byte* k_step;
      float* c;
      int block, p;
      bool first, last;
    } late;
    const auto settle = [&] {
      if (!late.sums) return;
      const int rows = m - 32 * late.block < 32 ? m - 32 * late.block : 32;
      const Fp8Scale<V> scale[2] = {Fp8Scale<V>(late.k_step), Fp8Scale<V>(late.k_step + kTile)};
      for (int i = 0; i < 2 * rows; ++i) scale[i % 2].add(V::load(late.sums + 16 * i), late.c + 16 * i, !late.first);
      if (!late.last) return;
      if (plus) {
        Gemm::template block_product<false>(Gemm::block_tiles(m, late.block), {}, Gemm::run_of(*plus, m, late.block, late.p), nullptr, more,
                                            typename Gemm::Idle{});
        Gemm::add_rows(late.c, more, rows);
      }
      finished(late.c, nullptr, 32 * late.block, rows, late.p);
    };

    int turn = 0, slot = 0;
    unpack(w.panel(p0), 0, 2 * kCodeRows, tiles[turn]);
    for (int p = p0; p < p1; ++p)
      for (int s = 0; s < k_steps; ++s, turn ^= 1) {
        const std::byte* k_step = w.panel(p) + static_cast<std::ptrdiff_t>(s) * 2 * kTile;
        const bool last = s + 1 == k_steps;
        const std::byte* next = !last ? k_step + 2 * kTile : p + 1 < p1 ? w.panel(p + 1) : nullptr;
        for (int block = 0; block < blocks; ++block) {
          float* to = sums[slot ^= 1];
          const typename Gemm::Run run{operand + Gemm::tile_at(m, steps, 2 * block, kSteps * s), tiles[turn], kSteps};
          Gemm::template block_product<false>(Gemm::block_tiles(m, block), {}, run, nullptr, to, typename Gemm::Idle{});
          if (next) unpack(next, 2 * kCodeRows * block / blocks, 2 * kCodeRows * (block + 1) / blocks, tiles[turn ^ 1]);
          settle();
          late = {to, k_step, c + (p - p0) * static_cast<std::ptrdiff_t>(c_block_floats(m)) + block * kBlock, block, p, s == 0, last};
        }
      }
    settle();
  }
};
