// The backward pass of one part of a layer. One task owns an expert; all its blocks are done in row order, so that gradients sum in a fixed
// order.
//
//   s = LoRA scaling, w = routing weight of the row, dY = gradient of the layer's output (the row's token)
//   dH~ = dY Wd + s (dY Bd) Ad            gradient of h before the routing weight; <h, dH~> + <dY, bias> is the router's gradient
//   dG, dU = activation backward of w dH~ from the cached gate and up; without a gate there is dU alone
//   dX = [dG|dU] Wgu + s ([dG|dU] Bgu) Agu
//   dBd = (w dY)^T (s Ud)    dAd = (s w dY Bd)^T h    dBg = dG^T (s Ug)    dAg = (s dG Bg)^T x    and so for up
//   dWd = (w dY)^T h         dWg = dG^T x             dWu = dU^T x         of experts that are trained themselves
// Dropout multiplies A's input with a mask: x and h in dAg, dAu, dAd, and what comes back through Agu and Ad.
// Every GEMM reads the forward's packed bytes. With few experts the stages of one expert are shared by all workers instead.
#include <algorithm>
#include <optional>

#include "moe/base_gradients.h"
#include "moe/expert_rows.h"
#include "moe/part.h"
#include "moe/schedule.h"

namespace ktmoe {
namespace {

constexpr int kGroupColumns = 256;  // columns of one backward call; also the unit of the router gradient's partial sums

struct Pass {
  const LayerPart& part;
  const KernelTable& kernels;
  const MoeConfig& config;
  const BackwardPass& in;
  const ForwardCache::Kept& kept;
  const RoutePlan& plan;
  const LoraAdapter* lora;
  const Dropout& dropout;
  ExpertRows rows;  // dX of each row
  float* dots;      // [plan.rows()]: gradient of the routing weight
  const Gradients& grads;
};

// Rows and columns of a matrix of the whole layer that a part writes.
struct Region {
  int row, rows, column, columns;
};
Region region_of(LoraTensor t, const LoraAdapter& lora, const Slice& slice) {
  const auto [rows, columns] = lora.shape(t);
  if (t == kGateB || t == kUpB) return {slice.first, slice.inter, 0, columns};
  if (t == kDownA) return {0, rows, slice.first, slice.inter};
  return {0, rows, 0, columns};
}

// Runs the units of a stage: here, or on all workers.
struct Units {
  ThreadPool::Session& session;
  int worker;   // whose scratch, when serial
  bool shared;  // all workers take part

  template <class F>
  void each(int n, F f) const {
    if (!shared) {
      for (int i = 0; i < n; ++i) f(i, session.scratch(worker));
      return;
    }
    session.parallel_for(n, [&](int i, int w) {
      session.scratch(w).reset();
      f(i, session.scratch(w));
    });
  }
};

class ExpertBackward {
 public:
  ExpertBackward(const Pass& pass, int expert, const Units& units, Scratch& scratch)
      : p_(pass), k_(pass.kernels), units_(units), scratch_(scratch), e_(expert), expert_(pass.part.expert(expert)) {
    if (p_.lora) lora_ = p_.lora->expert(expert, slice());
  }

  void run(const RoutePlan::Block* blocks, int n_blocks) {
    int most = 0, rows = 0;
    for (int i = 0; i < n_blocks; rows += blocks[i++].rows) most = std::max(most, blocks[i].rows);
    allocate(most, want_base() ? rows : most);
    bf16 *const h = h_, *const dgu = dgu_;
    for (int i = 0; i < n_blocks; ++i) {
      block_ = blocks[i];
      m_ = block_.rows;
      if (want_base()) {  // h and dG|dU of all blocks are kept
        h_ = h + (block_.begin - blocks->begin) * h_ld_;
        dgu_ = dgu + (block_.begin - blocks->begin) * dgu_ld_;
      }
      // Gradients of LoRA come as soon as they can: what they read is still in the L2.
      if (p_.lora) down_lora();
      if (want_lora()) grad_b_down(i == 0);
      through_down();
      if (want_lora()) grad_a_down(i == 0), grad_b_gate_up(i == 0);
      if (p_.lora) gate_up_lora();
      if (want_lora()) grad_a_gate_up(i == 0);
      through_gate_up();
    }
    if (want_lora()) write_lora_gradients();
    if (want_base()) base_gradients(blocks, n_blocks, most, h, dgu);
  }

 private:
  static bool scaled(const PackedMatrix& w) { return format_info(w.layout().format).has_scales; }
  const Slice& slice() const { return p_.part.slice(); }
  bool want_lora() const { return static_cast<bool>(p_.grads.lora[kDownA]); }
  bool want_base() const { return static_cast<bool>(p_.grads.base[2]); }
  float scaling() const { return p_.lora->scaling * p_.dropout.factor(); }
  Dropout::Row mask(Dropout::Site site, int row) const {
    return p_.dropout.row(site, p_.in.first_token + p_.plan.token[static_cast<std::size_t>(block_.begin + row)], e_);
  }
  int rank() const { return p_.lora->rank; }
  int gate_up_columns() const { return expert_.gate_up.layout().n_panels * kPanelColumns; }
  int h_columns() const { return expert_.gate_up.layout().n_panels * p_.config.activation.h_per_panel(); }
  bool gated() const { return p_.config.activation.gated(); }
  int projections() const { return p_.config.activation.projections(); }
  RowSource dy() const { return {p_.in.grad_out.data, p_.in.grad_out.ld, p_.plan.token.data() + block_.begin}; }
  RowSource block_x() const { return {p_.in.x, p_.config.hidden, p_.plan.token.data() + block_.begin}; }
  const float* weight() const { return p_.plan.weight.data() + block_.begin; }
  template <class T>
  T* take(std::size_t rows, int columns) {
    return scratch_.take<T>(rows * static_cast<std::size_t>(columns));
  }

  // most: rows of the largest block. kept: rows of h and dG|dU that must live at once.
  void allocate(int most, int kept) {
    const std::size_t m = static_cast<std::size_t>(most);
    const int down_panels = expert_.down.layout().n_panels, gate_up_panels = expert_.gate_up.layout().n_panels;
    // dH~ comes in groups of kGroupColumns, so h and dgate_up are padded to that.
    h_ld_ = round_up(std::max(h_columns(), p_.config.inter), kGroupColumns);
    dgu_ld_ = projections() * h_ld_;
    h_ = take<bf16>(static_cast<std::size_t>(kept), static_cast<int>(h_ld_));
    dgu_ = take<bf16>(static_cast<std::size_t>(kept), static_cast<int>(dgu_ld_));
    dot_parts_ = take<float>(m, static_cast<int>(h_ld_) / kGroupColumns);
    dy_operand_ = scratch_.take<std::byte>(k_.grad_operand_bytes(most, down_panels));
    dgu_operand_ = scratch_.take<std::byte>(k_.grad_operand_bytes(most, gate_up_panels));
    const int lora_blocks = p_.lora ? ceil_div(2 * rank(), kPanelColumns) : 0;
    c_ = scratch_.take<float>(c_block_floats(most) * static_cast<std::size_t>(std::max(kGroupColumns / kPanelColumns, lora_blocks)));
    if (!p_.lora) return;
    v_ld_ = round_up(2 * rank(), kPanelColumns);
    for (bf16** v : {&v_gate_up_, &v_down_, &wv_down_, &wu_down_}) *v = take<bf16>(m, static_cast<int>(v_ld_));
    const int v_panels = static_cast<int>(v_ld_) / kPanelColumns;
    v_operand_ = scratch_.take<std::byte>(k_.grad_operand_bytes(most, v_panels));
    if (scaled(expert_.gate_up) || scaled(expert_.down)) {
      plain_operand_ = scratch_.take<std::byte>(k_.grad_operand_bytes(most, std::max(down_panels, gate_up_panels)));
    }
    if (!want_lora()) return;
    outer_operand_ = scratch_.take<std::byte>(k_.outer_operand_bytes(most, 2 * rank()));
    const std::size_t r = static_cast<std::size_t>(rank());
    hidden_ld_ = round_up(p_.config.hidden, kTileColumns);
    grad_a_gate_up_ = take<float>(2 * r, static_cast<int>(hidden_ld_));
    grad_b_down_ = take<float>(r, static_cast<int>(hidden_ld_));
    for (float** g : {&grad_b_gate_, &grad_b_up_, &grad_a_down_}) *g = take<float>(r, h_columns());
    // Q rows must be readable in whole tiles: tokens with a ragged hidden size are copied.
    if (p_.config.hidden % kTileColumns) padded_dy_ = take<bf16>(m, static_cast<int>(hidden_ld_));
    if (p_.config.hidden % kTileColumns || p_.dropout) padded_x_ = take<bf16>(m, static_cast<int>(hidden_ld_));
    if (p_.dropout) dropped_h_ = take<bf16>(m, static_cast<int>(h_ld_));
  }

  // C blocks of columns [column0, column0 + columns) of dY W (+ V A), in a worker's scratch. column0 is a multiple of 64.
  float* columns_of(Scratch& scratch, const std::byte* operand, const PackedMatrix& w, const PackedMatrix* lora, Dropout::Site site,
                    int column0, int columns) {
    const int step = format_info(w.layout().format).k_step, s0 = column0 / step;
    const int s1 = std::min(ceil_div(column0 + columns, step), w.layout().k_steps);
    float* c = units_.shared ? scratch.take<float>(c_block_floats(m_) * (kGroupColumns / kPanelColumns)) : c_;
    const bool mask_first = lora && p_.dropout;  // the mask is for LoRA's part alone
    if (mask_first)
      std::fill_n(c, c_block_floats(m_) * static_cast<std::size_t>(ceil_div((s1 - s0) * step, kPanelColumns)), 0.0f);
    else
      k_.backward(operand, m_, w, s0, s1, c, false);
    if (lora) {
      const int l0 = column0 / kPanelColumns, l1 = std::min(ceil_div(column0 + columns, kPanelColumns), lora->layout().k_steps);
      k_.backward(v_operand_, m_, *lora, l0, l1, c, true);
    }
    if (mask_first) {
      const int offset = site == Dropout::kH ? slice().first : 0;  // masks count in the whole h
      for (int b = 0; b < ceil_div(columns, kPanelColumns); ++b)
        for (int r = 0; r < m_; ++r)
          mask(site, r).apply(c + c_block_floats(m_) * static_cast<std::size_t>(b) + r * kPanelColumns,
                              offset + column0 + b * kPanelColumns, kPanelColumns);
      k_.backward(operand, m_, w, s0, s1, c, true);
    }
    return c;
  }

  // v = factor * (dY B), rounded to bf16; then the operand of v for the way back through A.
  void lora_through_b(const std::byte* operand, const PackedMatrix& b, const PackedMatrix& a, int used, bf16* v) {
    const int blocks = ceil_div(used, kPanelColumns);
    k_.backward(operand, m_, b, 0, b.layout().k_steps, c_, false);
    k_.c_to_bf16(c_, m_, blocks, scaling(), nullptr, v, v_ld_);
    k_.pack_grad_operand({v, v_ld_, nullptr}, nullptr, m_, used, a.layout().n_panels, v_operand_);
    if (v == v_down_ && want_lora()) k_.c_to_bf16(c_, m_, blocks, scaling(), weight(), wv_down_, v_ld_);
  }

  void down_lora() {
    std::byte* operand = scaled(expert_.down) ? plain_operand_ : dy_operand_;
    k_.pack_grad_operand(dy(), nullptr, m_, p_.config.hidden, expert_.down.layout().n_panels, operand);
    lora_through_b(operand, lora_.b_down, lora_.a_down, rank(), v_down_);
  }

  // dY -> dH~ -> dG|dU, h, and the router's dot products.
  void through_down() {
    if (scaled(expert_.down) || !p_.lora)
      k_.pack_grad_operand(dy(), scaled(expert_.down) ? expert_.down.scales() : nullptr, m_, p_.config.hidden,
                           expert_.down.layout().n_panels, dy_operand_);
    const int groups = ceil_div(h_columns(), kGroupColumns);
    const std::ptrdiff_t gu_ld = gate_up_columns();
    const bf16* gate_up = p_.kept.gate_up.as<bf16>() + block_.begin * gu_ld;
    std::fill_n(dot_parts_, static_cast<std::size_t>(groups) * static_cast<std::size_t>(m_), 0.0f);
    units_.each(groups, [&](int g, Scratch& scratch) {
      const int first = g * kGroupColumns, columns = std::min(kGroupColumns, h_columns() - first);
      float* c = columns_of(scratch, dy_operand_, expert_.down, p_.lora ? &lora_.a_down : nullptr, Dropout::kH, first, columns);
      const Activation& a = p_.config.activation;
      k_.activate_backward(a, c, m_, columns / a.h_per_panel(), gate_up + projections() * first, gu_ld, weight(),
                           dgu_ + projections() * first, dgu_ld_, h_ + first, h_ld_, dot_parts_ + static_cast<std::ptrdiff_t>(g) * m_);
    });
    for (int r = 0; r < m_; ++r) {
      float sum = 0.0f;
      for (int g = 0; g < groups; ++g) sum += dot_parts_[static_cast<std::ptrdiff_t>(g) * m_ + r];
      p_.dots[block_.begin + r] = sum;
    }
    if (expert_.down_bias) k_.dot_rows(dy(), m_, expert_.down_bias, p_.config.hidden, p_.dots + block_.begin);
  }

  void gate_up_lora() {
    std::byte* operand = scaled(expert_.gate_up) ? plain_operand_ : dgu_operand_;
    k_.pack_grad_operand({dgu_, dgu_ld_, nullptr}, nullptr, m_, gate_up_columns(), expert_.gate_up.layout().n_panels, operand);
    lora_through_b(operand, lora_.b_gate_up, lora_.a_gate_up, p_.lora->gate_up_rank(), v_gate_up_);
  }

  void through_gate_up() {
    if (scaled(expert_.gate_up) || !p_.lora)
      k_.pack_grad_operand({dgu_, dgu_ld_, nullptr}, scaled(expert_.gate_up) ? expert_.gate_up.scales() : nullptr, m_, gate_up_columns(),
                           expert_.gate_up.layout().n_panels, dgu_operand_);
    if (!p_.rows) return;
    const int hidden = p_.rows.columns();
    units_.each(ceil_div(hidden, kGroupColumns), [&](int g, Scratch& scratch) {
      const int first = g * kGroupColumns, columns = std::min(kGroupColumns, hidden - first);
      float* c = columns_of(scratch, dgu_operand_, expert_.gate_up, p_.lora ? &lora_.a_gate_up : nullptr, Dropout::kX, first, columns);
      p_.rows.store(k_, c, m_, columns / kPanelColumns, block_.begin, first);
      p_.rows.stored();
    });
  }

  // out[i][j] (+)= sum over rows of P[row][i] Q[row][j], columns of Q shared out in units of 16 tiles.
  void outer(const bf16* p, std::ptrdiff_t p_ld, int p_columns, RowSource q, int tile_stride, int columns, float* out, std::ptrdiff_t ld,
             bool first) {
    k_.pack_outer_operand(p, p_ld, m_, p_columns, outer_operand_);
    const int tiles = ceil_div(columns, kTileColumns);
    constexpr int kUnit = 16;
    units_.each(ceil_div(tiles, kUnit), [&](int u, Scratch&) {
      RowSource part = q;
      part.base = static_cast<const bf16*>(q.base) + static_cast<std::ptrdiff_t>(u) * kUnit * tile_stride;
      k_.outer(outer_operand_, m_, p_columns, part, tile_stride, std::min(kUnit, tiles - u * kUnit), out + u * kUnit * kTileColumns, ld,
               !first);
    });
  }

  RowSource whole_tiles(RowSource rows, bf16* padded) {
    if (!padded) return rows;
    for (int r = 0; r < m_; ++r) {
      std::memset(padded + r * hidden_ld_, 0, sizeof(bf16) * static_cast<std::size_t>(hidden_ld_));
      std::memcpy(padded + r * hidden_ld_, rows.row<bf16>(r), sizeof(bf16) * static_cast<std::size_t>(p_.config.hidden));
    }
    return {padded, hidden_ld_, nullptr};
  }

  // --- gradients of LoRA; first: of the expert's blocks ---

  void grad_b_down(bool first) {
    const std::ptrdiff_t u_ld = round_up(rank(), kPanelColumns);
    const bf16* u = p_.kept.u_down.as<bf16>() + block_.begin * u_ld;
    for (int i = 0; i < m_; ++i)
      for (int j = 0; j < rank(); ++j) wu_down_[i * v_ld_ + j] = to_bf16(weight()[i] * to_float(u[i * u_ld + j]));
    outer(wu_down_, v_ld_, rank(), whole_tiles(dy(), padded_dy_), kTileColumns, p_.config.hidden, grad_b_down_, hidden_ld_, first);
  }

  void grad_a_down(bool first) {
    const bf16* h = h_;
    if (p_.dropout) {
      for (int i = 0; i < m_; ++i) {
        bf16* row = dropped_h_ + i * h_ld_;
        std::memcpy(row, h_ + i * h_ld_, sizeof(bf16) * static_cast<std::size_t>(h_ld_));
        mask(Dropout::kH, i).apply(row, slice().first, p_.config.inter);
      }
      h = dropped_h_;
    }
    outer(wv_down_, v_ld_, rank(), {h, h_ld_, nullptr}, kTileColumns, h_columns(), grad_a_down_, h_columns(), first);
  }

  void grad_b_gate_up(bool first) {
    const int both = p_.lora->gate_up_rank();
    const std::ptrdiff_t u_ld = round_up(both, kPanelColumns);
    const bf16* u = p_.kept.u_gate_up.as<bf16>() + block_.begin * u_ld;
    // In panel order, tiles of gate and up alternate.
    const int apart = projections() * kTileColumns, to_up = apart - kTileColumns;
    if (gated()) outer(u, u_ld, rank(), {dgu_, dgu_ld_, nullptr}, apart, h_columns(), grad_b_gate_, h_columns(), first);
    outer(u + both - rank(), u_ld, rank(), {dgu_ + to_up, dgu_ld_, nullptr}, apart, h_columns(), grad_b_up_, h_columns(), first);
  }

  void grad_a_gate_up(bool first) {
    const RowSource x = whole_tiles(block_x(), padded_x_);
    for (int i = 0; p_.dropout && i < m_; ++i) mask(Dropout::kX, i).apply(padded_x_ + i * hidden_ld_, 0, p_.config.hidden);
    outer(v_gate_up_, v_ld_, p_.lora->gate_up_rank(), x, kTileColumns, p_.config.hidden, grad_a_gate_up_, hidden_ld_, first);
  }

  // h, dgu: of all blocks.
  void base_gradients(const RoutePlan::Block* blocks, int n_blocks, int most, const bf16* h, const bf16* dgu) {
    const int hidden = p_.config.hidden, inter = p_.config.inter;
    const std::ptrdiff_t e = e_;
    auto offset = [&](int i) { return blocks[i].begin - blocks->begin; };
    // place(c): where in which tensor column c of P belongs; a tensor that does not exist for columns of padding.
    auto bands = [&](int p_columns, int q_columns, auto block_of, auto place) {
      std::optional<Band> own;
      if (!units_.shared) own.emplace(k_, scratch_, most, q_columns);
      units_.each(ceil_div(p_columns, kBandRows), [&](int u, Scratch& scratch) {
        const int first = u * kBandRows, count = std::min(kBandRows, p_columns - first);
        Band band = own ? *own : Band(k_, scratch, most, q_columns);
        for (int i = 0; i < n_blocks; ++i) band.add(block_of(i), first, count, i == 0);
        for (int i = 0; i < count; ++i)
          if (const FloatOrBf16 row = place(first + i)) band.write(i, row, !p_.in.first_chunk);
      });
    };
    auto tokens = [&](int i) { return p_.plan.token.data() + blocks[i].begin; };
    bands(
        gate_up_columns(), hidden,
        [&](int i) {
          return BandBlock{blocks[i].rows, {dgu + offset(i) * dgu_ld_, dgu_ld_, nullptr}, nullptr, {p_.in.x, hidden, tokens(i)}};
        },
        [&](int c) {
          const int row = gated() ? c / kPanelColumns * kTileColumns + c % kTileColumns : c;
          const std::size_t tensor = gated() ? static_cast<std::size_t>(c / kTileColumns % 2) : 1;
          if (row >= inter) return FloatOrBf16{};
          return p_.grads.base[tensor].from((e * slice().whole + slice().first + row) * hidden);
        });
    bands(
        hidden, inter,
        [&](int i) {
          return BandBlock{blocks[i].rows,
                           {p_.in.grad_out.data, p_.in.grad_out.ld, tokens(i)},
                           p_.plan.weight.data() + blocks[i].begin,
                           {h + offset(i) * h_ld_, h_ld_, nullptr}};
        },
        [&](int c) { return p_.grads.base[2].from((e * hidden + c) * slice().whole + slice().first); });
  }

  void write_lora_gradients() {
    const int r = rank();
    if (gated()) {
      write_rows(kGateA, grad_a_gate_up_, hidden_ld_);
      write_transposed(kGateB, grad_b_gate_, h_columns());
    }
    write_rows(kUpA, grad_a_gate_up_ + (p_.lora->gate_up_rank() - r) * hidden_ld_, hidden_ld_);
    write_rows(kDownA, grad_a_down_, h_columns());
    write_transposed(kUpB, grad_b_up_, h_columns());
    write_transposed(kDownB, grad_b_down_, hidden_ld_);
  }
  // The expert's gradient in the caller's tensor, as far as this part writes it.
  struct Target {
    float* at;
    std::ptrdiff_t ld;
    int rows, columns;
    bool write;  // or add
    void put(int i, int j, float value) const {
      float& to = at[i * ld + j];
      to = write ? value : to + value;
    }
  };
  Target target(LoraTensor t) const {
    const LoraGradient& grad = p_.grads.lora[t];
    const Region own = region_of(t, *p_.lora, slice());
    const bool second = t == kUpA && grad.data == p_.grads.lora[kGateA].data;  // of a sum
    return {grad.at(e_, own.row, own.column), grad.row, own.rows, own.columns, p_.in.first_chunk && !second};
  }
  void write_rows(LoraTensor t, const float* src, std::ptrdiff_t ld) {
    const Target to = target(t);
    for (int i = 0; i < to.rows; ++i)
      for (int j = 0; j < to.columns; ++j) to.put(i, j, src[i * ld + j]);
  }
  // A line of src at a time: its rows often lie whole pages apart, and few of them then fit into the L1 together.
  void write_transposed(LoraTensor t, const float* src, std::ptrdiff_t ld) {
    constexpr int kLine = 16;
    const Target to = target(t);
    for (int first = 0; first < to.rows; first += kLine)
      for (int j = 0; j < to.columns; ++j)
        for (int i = first; i < std::min(first + kLine, to.rows); ++i) to.put(i, j, src[j * ld + i]);
  }

  const Pass& p_;
  const KernelTable& k_;
  const Units& units_;
  Scratch& scratch_;
  const int e_;
  const Expert expert_;
  LoraExpert lora_;
  RoutePlan::Block block_{};
  int m_ = 0;
  std::ptrdiff_t h_ld_ = 0, dgu_ld_ = 0, v_ld_ = 0, hidden_ld_ = 0;
  bf16 *h_ = nullptr, *dgu_ = nullptr, *v_gate_up_ = nullptr, *v_down_ = nullptr, *wv_down_ = nullptr, *wu_down_ = nullptr;
  bf16 *padded_x_ = nullptr, *padded_dy_ = nullptr, *dropped_h_ = nullptr;
  float *c_ = nullptr, *dot_parts_ = nullptr, *grad_a_gate_up_ = nullptr, *grad_b_down_ = nullptr, *grad_b_gate_ = nullptr,
        *grad_b_up_ = nullptr, *grad_a_down_ = nullptr;
  std::byte *dy_operand_ = nullptr, *dgu_operand_ = nullptr, *plain_operand_ = nullptr, *v_operand_ = nullptr, *outer_operand_ = nullptr;
};

// Runs all experts of a pass; an expert's gradients do not depend on which way is taken.
void run_experts(ThreadPool::Session& session, const Pass& pass) {
  const RoutePlan& plan = pass.plan;
  auto expert = [&](int i, const Units& units, Scratch& scratch) {
    const int first = plan.expert_blocks[static_cast<std::size_t>(i)], last = plan.expert_blocks[static_cast<std::size_t>(i) + 1];
    scratch.reset();
    const RoutePlan::Block* blocks = plan.blocks.data() + first;
    ExpertBackward(pass, blocks->expert, units, scratch).run(blocks, last - first);
  };
  int most_rows = 0;
  for (int i = 0; i < plan.active_experts(); ++i) {
    const RoutePlan::Block& first = plan.blocks[static_cast<std::size_t>(plan.expert_blocks[static_cast<std::size_t>(i)])];
    const RoutePlan::Block& last = plan.blocks[static_cast<std::size_t>(plan.expert_blocks[static_cast<std::size_t>(i) + 1]) - 1];
    most_rows = std::max(most_rows, last.begin + last.rows - first.begin);
  }
  if (owner_pays(plan.active_experts(), most_rows, plan.rows(), session.threads()))
    session.parallel_for(plan.active_experts(), [&](int i, int worker) { expert(i, {session, worker, false}, session.scratch(worker)); });
  else
    for (int i = 0; i < plan.active_experts(); ++i) expert(i, {session, 0, true}, session.stage());
}

void combine(ThreadPool::Session& session, const Pass& pass) {
  const RoutePlan& plan = pass.plan;
  constexpr int kUnit = 16;
  session.parallel_for(ceil_div(plan.n_tokens, kUnit), [&](int unit, int worker) {
    Scratch& scratch = session.scratch(worker);
    scratch.reset();
    float* sum = scratch.take<float>(static_cast<std::size_t>(pass.rows.columns()));
    for (int t = unit * kUnit; t < std::min((unit + 1) * kUnit, plan.n_tokens); ++t) {
      const std::ptrdiff_t slot = static_cast<std::ptrdiff_t>(t) * plan.top_k, hidden = pass.config.hidden;
      const std::int32_t* row_of = plan.row_of.data() + slot;
      if (pass.rows) {
        pass.rows.combine(pass.kernels, row_of, nullptr, plan.top_k, sum);
        const FloatOrBf16 dst = pass.grads.input.from(t * hidden);
        if (dst.f32) std::memcpy(dst.f32, sum, sizeof(float) * static_cast<std::size_t>(hidden));
        if (dst.b16) pass.kernels.round_row(sum, pass.config.hidden, dst.b16);
      }
      for (int s = 0; pass.grads.weights && s < plan.top_k; ++s) pass.grads.weights[slot + s] = row_of[s] < 0 ? 0.0f : pass.dots[row_of[s]];
    }
  });
}

// Zeros in `rows` x `columns` at `at`, whose rows are `ld` apart.
void clear(FloatOrBf16 at, std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t ld) {
  for (std::ptrdiff_t i = 0; i < rows; ++i) {
    if (at.f32) std::fill_n(at.f32 + i * ld, columns, 0.0f);
    if (at.b16) std::fill_n(at.b16 + i * ld, columns, bf16{});
  }
}

}  // namespace

void LayerPart::clear_gradients(ThreadPool::Session& session, const RoutePlan* first, const LoraAdapter* lora,
                                const Gradients& grads) const {
  std::vector<std::uint8_t> active(static_cast<std::size_t>(config_.n_experts), 0);
  if (first)
    for (const auto& b : first->blocks) active[static_cast<std::size_t>(b.expert)] = 1;
  const int hidden = config_.hidden, whole = slice_.whole;
  session.parallel_for(config_.n_experts, [&](int e, int) {
    if (active[static_cast<std::size_t>(e)]) return;
    for (const LoraTensor t : {kGateA, kGateB, kUpA, kUpB, kDownA, kDownB}) {
      const bool own_term = t == kGateA || t == kUpA || t == kDownB;
      if (!grads.lora[t] || (own_term && !slice_.leads())) continue;
      const Region own = region_of(t, *lora, slice_);
      clear({grads.lora[t].at(e, own.row, own.column)}, own.rows, own.columns, grads.lora[t].row);
    }
    const std::ptrdiff_t matrix = static_cast<std::ptrdiff_t>(whole) * hidden;
    for (const FloatOrBf16& g : {grads.base[0], grads.base[1]})
      clear(g.from(e * matrix + static_cast<std::ptrdiff_t>(slice_.first) * hidden), slice_.inter, hidden, hidden);
    clear(grads.base[2].from(e * matrix + slice_.first), hidden, slice_.inter, whole);
  });
}

void LayerPart::backward(ThreadPool::Session& session, const BackwardPass& in, const ForwardCache::Kept& kept,
                         const Gradients& grads) const {
  const std::size_t rows = static_cast<std::size_t>(in.plan.rows());
  session.shared().reset();
  Pass pass{*this, kernels_, config_, in, kept, in.plan, in.lora, in.dropout, {}, nullptr, grads};
  if (grads.input) pass.rows = ExpertRows(session.shared(), in.plan.rows(), config_.hidden);
  pass.dots = session.shared().take<float>(rows);
  run_experts(session, pass);
  combine(session, pass);
}

}  // namespace ktmoe
