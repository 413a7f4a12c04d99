// The forward pass of one part of a layer.
//
//   X --(quantise)--> operand --gate/up GEMM (+ LoRA, bias)--> C --activation--> h --operand--> down GEMM (+ LoRA, bias) --> rows
//   --combine--> out
//
// Two schedules, the same arithmetic (a row's result depends on its block alone, never on the schedule or the thread):
//   owner   one task computes a whole block of an expert, so that its activations stay in the L2; when blocks are many
//   panels  all workers share each stage of all blocks; when blocks are few (decode, or few experts)
#include <algorithm>

#include "moe/expert_rows.h"
#include "moe/part.h"
#include "moe/schedule.h"

namespace ktmoe {
namespace {

constexpr int kGroupPanels = 8;  // most panels of a unit of a shared stage
// Most panels of one kernel call, so that its C blocks take 256 KB.
int call_panels(int m) {
  return std::max(kGroupPanels, static_cast<int>(65536 / c_block_floats(m)));
}

// An epilogue that calls f(c, row, rows, panel); f outlives it.
template <class F>
Epilogue epilogue_of(F& f) {
  return {[](void* context, float* c, int row, int rows, int panel) { (*static_cast<F*>(context))(c, row, rows, panel); }, &f};
}

struct Pass {
  const LayerPart& part;
  const KernelTable& kernels;
  const MoeConfig& config;
  const RoutePlan& plan;
  const LoraAdapter* lora;
  Dropout dropout;
  int first_token;  // of the chunk in the call
  Tokens x;
  const std::int8_t* x8;  // int8: quantised tokens [n_tokens][k padded] and their scales
  const float* x_scale;
  std::ptrdiff_t x8_ld;
  ForwardCache::Kept* cache;  // or null
  ExpertRows rows;            // the experts' outputs
};

// One block on its way through the layer. Buffers come from the scratch of the worker (owner) or of the call (panels).
class BlockForward {
 public:
  BlockForward(const Pass& pass, const RoutePlan::Block& block)
      : p_(pass), block_(block), m_(block.rows), expert_(pass.part.expert(block.expert)) {
    if (p_.lora) lora_ = p_.lora->expert(block.expert, p_.part.slice());
  }

  int gate_up_panels() const { return expert_.gate_up.layout().n_panels; }
  int down_panels() const { return expert_.down.layout().n_panels; }

  void allocate(Scratch& scratch) {
    const KernelTable& k = p_.kernels;
    const WeightFormat lora_format = WeightFormat::bf16;
    const int hidden = p_.config.hidden, inter = p_.config.inter, m = m_;
    h_ld_ = gate_up_panels() * h_per_panel();
    h_ = scratch.take<bf16>(static_cast<std::size_t>(m) * static_cast<std::size_t>(h_ld_));
    operand_ = scratch.take<std::byte>(
        std::max(k.operand_bytes(expert_.gate_up.layout().format, m, hidden), k.operand_bytes(expert_.down.layout().format, m, inter)));
    if (int8(expert_.down)) {
      h8_ld_ = expert_.down.layout().k_padded();
      h8_ = scratch.take<std::int8_t>(static_cast<std::size_t>(m) * static_cast<std::size_t>(h8_ld_));
      h_scale_ = scratch.take<float>(static_cast<std::size_t>(m));
    }
    if (!p_.lora) return;
    const int rank = p_.lora->rank;
    if (lora_packs(expert_.gate_up) || lora_packs(expert_.down))
      lora_operand_ = scratch.take<std::byte>(std::max(k.operand_bytes(lora_format, m, hidden), k.operand_bytes(lora_format, m, inter)));
    u_operand_ = scratch.take<std::byte>(k.operand_bytes(lora_format, m, 2 * rank));
    u_ = scratch.take<bf16>(static_cast<std::size_t>(m) * static_cast<std::size_t>(round_up(2 * rank, kPanelColumns)));
    if (p_.dropout) dropped_ = scratch.take<bf16>(static_cast<std::size_t>(m) * static_cast<std::size_t>(std::max(hidden, inter)));
  }

  // X rows -> operand; U = scaling * X A^T.
  void begin(Scratch& scratch) {
    const RowSource rows{p_.x.data, p_.x.ld, p_.plan.token.data() + block_.begin};
    const WeightFormat format = expert_.gate_up.layout().format;
    if (int8(expert_.gate_up))
      p_.kernels.pack_operand(format, {p_.x8, p_.x8_ld, rows.index}, p_.x_scale, m_, p_.config.hidden, operand_);
    else
      p_.kernels.pack_operand(format, rows, nullptr, m_, p_.config.hidden, operand_);
    if (p_.lora)
      lora_activations(scratch, Dropout::kX, rows, p_.config.hidden, expert_.gate_up, lora_.a_gate_up, p_.lora->gate_up_rank(),
                       p_.cache ? p_.cache->u_gate_up.as<bf16>() : nullptr);
  }

  // Panels [p0, p1) of gate/up -> h.
  void gate_up(Scratch& scratch, int p0, int p1) {
    const std::ptrdiff_t ld = static_cast<std::ptrdiff_t>(gate_up_panels()) * kPanelColumns;
    bf16* keep = p_.cache ? p_.cache->gate_up.as<bf16>() + block_.begin * ld : nullptr;
    auto activate = [&](float* c, int row, int rows, int panel) {
      if (expert_.gate_up_bias) p_.kernels.add_bias(c, rows, 1, expert_.gate_up_bias + panel * kPanelColumns);
      p_.kernels.activate(p_.config.activation, c, rows, 1, h_ + row * h_ld_ + panel * h_per_panel(), h_ld_,
                          keep ? keep + row * ld + panel * kPanelColumns : nullptr, ld);
    };
    product(scratch, expert_.gate_up, p_.lora ? &lora_.b_gate_up : nullptr, p0, p1, epilogue_of(activate));
  }

  // h -> operand; U = scaling * h A^T.
  void middle(Scratch& scratch) {
    const RowSource rows{h_, h_ld_, nullptr};
    const WeightFormat format = expert_.down.layout().format;
    if (int8(expert_.down)) {
      p_.kernels.quantize_rows(rows, m_, p_.config.inter, h8_, h8_ld_, h_scale_);
      p_.kernels.pack_operand(format, {h8_, h8_ld_, nullptr}, h_scale_, m_, p_.config.inter, operand_);
    } else {
      p_.kernels.pack_operand(format, rows, nullptr, m_, p_.config.inter, operand_);
    }
    if (p_.lora)
      lora_activations(scratch, Dropout::kH, rows, p_.config.inter, expert_.down, lora_.a_down, p_.lora->rank,
                       p_.cache ? p_.cache->u_down.as<bf16>() : nullptr);
  }

  // Panels [p0, p1) of down -> rows.
  void down(Scratch& scratch, int p0, int p1) {
    auto store = [&](float* c, int row, int rows, int panel) {
      if (expert_.down_bias) p_.kernels.add_bias(c, rows, 1, expert_.down_bias + panel * kPanelColumns);
      p_.rows.store(p_.kernels, c, rows, 1, block_.begin + row, panel * kPanelColumns);
    };
    product(scratch, expert_.down, p_.lora ? &lora_.b_down : nullptr, p0, p1, epilogue_of(store));
    p_.rows.stored();
  }

  void whole(Scratch& scratch) {
    const int group = call_panels(m_);
    begin(scratch);
    for (int p = 0; p < gate_up_panels(); p += group) gate_up(scratch, p, std::min(p + group, gate_up_panels()));
    middle(scratch);
    for (int p = 0; p < down_panels(); p += group) down(scratch, p, std::min(p + group, down_panels()));
  }

 private:
  static bool int8(const PackedMatrix& w) { return w.layout().direct() == WeightFormat::int8; }
  int h_per_panel() const { return p_.config.activation.h_per_panel(); }
  // Whether LoRA needs an operand of its own beside that of w: it multiplies in bf16, by what dropout left.
  bool lora_packs(const PackedMatrix& w) const { return w.layout().format != WeightFormat::bf16 || p_.dropout; }

  // Panels [p0, p1) of operand_ W^T (+ U B^T).
  void product(Scratch& scratch, const PackedMatrix& w, const PackedMatrix* lora_b, int p0, int p1, const Epilogue& epilogue) {
    float* c = c_blocks(scratch, p1 - p0);
    if (!lora_b) return p_.kernels.forward(operand_, m_, w, p0, p1, c, nullptr, &epilogue);
    const Addend lora{u_operand_, *lora_b};
    p_.kernels.forward(operand_, m_, w, p0, p1, c, &lora, &epilogue);
  }

  float* c_blocks(Scratch& scratch, int n) {
    // One C area serves every call of a task; the worker's scratch is reset between tasks.
    if (!c_ || c_from_ != &scratch || c_count_ < n) {
      c_ = scratch.take<float>(c_block_floats(m_) * static_cast<std::size_t>(n));
      c_from_ = &scratch;
      c_count_ = n;
    }
    return c_;
  }

  // u_operand_ = operand of scaling * X A^T (rounded to bf16; `used` columns), which the cache also keeps. operand_ holds X for w.
  void lora_activations(Scratch& scratch, Dropout::Site site, RowSource rows, int k, const PackedMatrix& w, const PackedMatrix& a, int used,
                        bf16* keep) {
    const int panels = a.layout().n_panels, columns = panels * kPanelColumns;
    if (p_.dropout) {
      const int first = site == Dropout::kH ? p_.part.slice().first : 0;  // masks count in the whole h
      for (int i = 0; i < m_; ++i) {
        bf16* row = dropped_ + static_cast<std::ptrdiff_t>(i) * k;
        std::memcpy(row, rows.row<bf16>(i), sizeof(bf16) * static_cast<std::size_t>(k));
        const int token = p_.first_token + p_.plan.token[static_cast<std::size_t>(block_.begin + i)];
        p_.dropout.row(site, token, block_.expert).apply(row, first, k);
      }
      rows = {dropped_, k, nullptr};
    }
    const std::byte* x = operand_;
    if (lora_packs(w)) {
      p_.kernels.pack_operand(WeightFormat::bf16, rows, nullptr, m_, k, lora_operand_);
      x = lora_operand_;
    }
    float* c = c_blocks(scratch, panels);
    p_.kernels.forward(x, m_, a, 0, panels, c, nullptr, nullptr);
    bf16* u = keep ? keep + static_cast<std::ptrdiff_t>(block_.begin) * columns : u_;
    p_.kernels.c_to_bf16(c, m_, panels, p_.lora->scaling * p_.dropout.factor(), nullptr, u, columns);
    p_.kernels.pack_operand(WeightFormat::bf16, {u, columns, nullptr}, nullptr, m_, used, u_operand_);
  }

  const Pass& p_;
  const RoutePlan::Block block_;
  const int m_;
  const Expert expert_;
  LoraExpert lora_;
  bf16 *h_ = nullptr, *u_ = nullptr, *dropped_ = nullptr;
  std::ptrdiff_t h_ld_ = 0, h8_ld_ = 0;
  std::int8_t* h8_ = nullptr;
  float *h_scale_ = nullptr, *c_ = nullptr;
  const Scratch* c_from_ = nullptr;
  int c_count_ = 0;
  std::byte *operand_ = nullptr, *lora_operand_ = nullptr, *u_operand_ = nullptr;
};

void run_owner(ThreadPool::Session& session, const Pass& pass) {
  session.parallel_for(static_cast<int>(pass.plan.blocks.size()), [&](int i, int worker) {
    Scratch& scratch = session.scratch(worker);
    scratch.reset();
    BlockForward block(pass, pass.plan.blocks[static_cast<std::size_t>(i)]);
    block.allocate(scratch);
    block.whole(scratch);
  });
}

void run_panels(ThreadPool::Session& session, const Pass& pass) {
  std::vector<BlockForward> blocks;
  for (const auto& b : pass.plan.blocks) blocks.emplace_back(pass, b).allocate(session.shared());
  if (blocks.empty()) return;
  const int n = static_cast<int>(blocks.size());
  // stage(block copy, scratch, unit): a copy, because workers use one block at once and each has C of its own.
  auto each = [&](int units, auto stage) {
    session.parallel_for(n * units, [&](int i, int worker) {
      Scratch& scratch = session.scratch(worker);
      scratch.reset();
      BlockForward block = blocks[static_cast<std::size_t>(i / units)];
      stage(block, scratch, i % units);
    });
  };
  auto each_panel = [&](int panels, auto stage) {
    const int group = std::clamp(ceil_div(panels * n, 4 * session.threads()), 1, kGroupPanels);
    each(ceil_div(panels, group), [&](BlockForward& block, Scratch& scratch, int unit) {
      stage(block, scratch, unit * group, std::min((unit + 1) * group, panels));
    });
  };
  each(1, [](BlockForward& b, Scratch& s, int) { b.begin(s); });
  each_panel(blocks[0].gate_up_panels(), [](BlockForward& b, Scratch& s, int p0, int p1) { b.gate_up(s, p0, p1); });
  each(1, [](BlockForward& b, Scratch& s, int) { b.middle(s); });
  each_panel(blocks[0].down_panels(), [](BlockForward& b, Scratch& s, int p0, int p1) { b.down(s, p0, p1); });
}

// int8 tokens, each quantised once however many experts read it.
void quantize_tokens(ThreadPool::Session& session, Pass& pass) {
  const int n = pass.plan.n_tokens, hidden = pass.config.hidden;
  pass.x8_ld = round_up(hidden, format_info(pass.config.format).k_step);
  auto* x8 = session.shared().take<std::int8_t>(static_cast<std::size_t>(n) * static_cast<std::size_t>(pass.x8_ld));
  auto* scale = session.shared().take<float>(static_cast<std::size_t>(n));
  constexpr int kUnit = 16;
  session.parallel_for(ceil_div(n, kUnit), [&](int unit, int) {
    const int t = unit * kUnit, count = std::min(kUnit, n - t);
    pass.kernels.quantize_rows({pass.x.data + t * pass.x.ld, pass.x.ld, nullptr}, count, hidden, x8 + t * pass.x8_ld, pass.x8_ld,
                               scale + t);
  });
  pass.x8 = x8;
  pass.x_scale = scale;
}

void combine(ThreadPool::Session& session, const Pass& pass, FloatOrBf16 out) {
  const RoutePlan& plan = pass.plan;
  constexpr int kUnit = 16;
  session.parallel_for(ceil_div(plan.n_tokens, kUnit), [&](int unit, int worker) {
    Scratch& scratch = session.scratch(worker);
    scratch.reset();
    float* sum = scratch.take<float>(static_cast<std::size_t>(pass.rows.columns()));
    for (int t = unit * kUnit; t < std::min((unit + 1) * kUnit, plan.n_tokens); ++t) {
      const std::ptrdiff_t slot = static_cast<std::ptrdiff_t>(t) * plan.top_k, hidden = pass.config.hidden;
      pass.rows.combine(pass.kernels, plan.row_of.data() + slot, plan.slot_weight.data() + slot, plan.top_k, sum);
      if (out.f32) std::memcpy(out.f32 + t * hidden, sum, sizeof(float) * static_cast<std::size_t>(hidden));
      if (out.b16) pass.kernels.round_row(sum, pass.config.hidden, out.b16 + t * hidden);
    }
  });
}

}  // namespace

void LayerPart::forward(ThreadPool::Session& session, const ForwardPass& in, ForwardCache::Kept* kept, FloatOrBf16 out) const {
  Pass pass{*this, kernels_, config_, in.plan, in.lora, in.dropout, in.first_token, in.x, nullptr, nullptr, 0, kept, {}};
  pass.rows = ExpertRows(session.shared(), in.plan.rows(), config_.hidden);
  if (format_info(config_.format).direct == WeightFormat::int8) quantize_tokens(session, pass);
  if (owner_pays(static_cast<int>(in.plan.blocks.size()), in.plan.most_rows(), in.plan.rows(), session.threads()))
    run_owner(session, pass);
  else
    run_panels(session, pass);
  combine(session, pass, out);
}

ForwardCache::Kept LayerPart::keep(int rows, const LoraAdapter* lora) const {
  const int rank = lora ? lora->rank : 0, gate_up_rank = lora ? lora->gate_up_rank() : 0;
  return {bf16_rows(rows, layout_.gate_up.n_panels * kPanelColumns, node_), bf16_rows(rows, round_up(gate_up_rank, kPanelColumns), node_),
          bf16_rows(rows, round_up(rank, kPanelColumns), node_)};
}

}  // namespace ktmoe
