// The passes of a layer: chunks of tokens, each computed by all parts at once, and the sums over the parts. Those are taken in part order,
// so results do not depend on who was first.
#include <algorithm>

#include "moe/finite.h"
#include "moe/layer.h"
#include "moe/schedule.h"

namespace ktmoe {
namespace {

using Terms = std::vector<float*>;  // what each part adds to a sum: fp32, dense, all of one shape

// out = the sum of the terms [n][columns].
void merge_rows(SubPools::Session& session, const KernelTable& kernels, const Terms& terms, int n, int columns, FloatOrBf16 out) {
  constexpr int kUnit = 16;
  session.parallel_for(ceil_div(n, kUnit), [&](int unit, Scratch& scratch) {
    float* rounded = scratch.take<float>(static_cast<std::size_t>(columns));
    for (int i = unit * kUnit; i < std::min((unit + 1) * kUnit, n); ++i) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(i) * columns;
      float* sum = out.f32 ? out.f32 + at : rounded;
      std::copy_n(terms[0] + at, columns, sum);
      for (std::size_t p = 1; p < terms.size(); ++p)
        for (int j = 0; j < columns; ++j) sum[j] += terms[p][at + j];
      if (out.b16) kernels.round_row(sum, columns, out.b16 + at);
    }
  });
}

void copy_tokens(SubPools::Session& session, Tokens from, int n, int hidden, bf16* to) {
  constexpr int kUnit = 64;
  session.parallel_for(ceil_div(n, kUnit), [&](int unit, Scratch&) {
    for (std::ptrdiff_t t = unit * kUnit; t < std::min((unit + 1) * kUnit, n); ++t)
      std::copy_n(from.data + t * from.ld, hidden, to + t * hidden);
  });
}

// Gradients of LoRA to which every part has a term: part 0 writes the caller's tensors, the others tensors of their own, which are added.
class LoraTerms {
 public:
  static constexpr LoraTensor kTensors[] = {kGateA, kUpA, kDownB};

  LoraTerms(const LoraAdapter* lora, const Gradients& whole, int parts) : lora_(lora), of_(static_cast<std::size_t>(parts), whole.lora) {
    for (std::size_t p = 1; p < of_.size(); ++p)
      for (const LoraTensor t : kTensors) {
        if (!whole.lora[t]) continue;
        memory_.emplace_back(checked_mul(checked_mul(size(t), static_cast<std::size_t>(lora_->n_experts)), sizeof(float)));
        const auto [rows, columns] = lora_->shape(t);
        of_[p][t] = {memory_.back().as<float>(), static_cast<std::ptrdiff_t>(rows) * columns, columns};
      }
  }

  const std::array<LoraGradient, 6>& of(int part) const { return of_[static_cast<std::size_t>(part)]; }

  void merge(SubPools::Session& session, const std::vector<ForwardCache::Chunk>& chunks) const {
    if (memory_.empty()) return;
    std::vector<std::uint8_t> active(static_cast<std::size_t>(lora_->n_experts), 0);
    for (const auto& chunk : chunks)
      for (const auto& block : chunk.plan.blocks) active[static_cast<std::size_t>(block.expert)] = 1;
    session.parallel_for(lora_->n_experts, [&](int e, Scratch&) {
      if (!active[static_cast<std::size_t>(e)]) return;
      for (const LoraTensor t : kTensors)
        for (std::size_t p = 1; of_[0][t] && p < of_.size(); ++p) {
          const auto [rows, columns] = lora_->shape(t);
          for (int i = 0; i < rows; ++i) {
            float* sum = of_[0][t].at(e, i, 0);
            const float* term = of_[p][t].at(e, i, 0);
            for (int j = 0; j < columns; ++j) sum[j] += term[j];
          }
        }
    });
  }

 private:
  std::size_t size(LoraTensor t) const {  // of one expert
    const auto [rows, columns] = lora_->shape(t);
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
  }

  const LoraAdapter* lora_;
  std::vector<std::array<LoraGradient, 6>> of_;
  std::vector<AlignedBuffer> memory_;
};

}  // namespace

void MoeLayer::check_ready(const char* function, const LoraAdapter* lora) const {
  require(loaded(), ErrorKind::runtime, "Weights not loaded: [", function, "] ", part(0).missing(), " of ", config_.n_experts,
          " experts are missing");
  if (!lora) return;
  require(lora->version() > 0, ErrorKind::runtime, "LoRA weights not initialized: [", function, "] the adapter was never updated");
  require(lora->n_experts == config_.n_experts && lora->hidden == config_.hidden && lora->inter == config_.inter, ErrorKind::value, "[",
          function, "] lora shape: got ", lora->n_experts, " x ", lora->hidden, " x ", lora->inter, ", expected ", config_.n_experts, " x ",
          config_.hidden, " x ", config_.inter);
  require(lora->gated == config_.activation.gated(), ErrorKind::value, "[", function, "] lora: got an adapter ",
          lora->gated ? "with" : "without", " gate matrices, expected one ", lora->gated ? "without" : "with");
}

void MoeLayer::check_inputs(const char* function, Tokens hidden, const Routing& routing) const {
  routing.check(config_);
  if (!config_.check_finite) return;
  check_finite(function, "hidden_states", hidden, routing.n_tokens, config_.hidden);
  check_finite(function, routing, config_);
}

// The fp32 rows of a pass (one per token and slot, in each part) are its largest buffer; this bounds it.
int MoeLayer::tokens_per_pass() const {
  constexpr std::size_t kRowBytes = std::size_t{384} << 20;
  const std::size_t per_token = static_cast<std::size_t>(parts()) * static_cast<std::size_t>(config_.top_k) *
                                static_cast<std::size_t>(layout_.down.n_panels) * kPanelColumns * sizeof(float);
  const int fits = static_cast<int>(std::clamp<std::size_t>(kRowBytes / per_token, 256, std::size_t{1} << 20));
  return config_.chunk_tokens > 0 ? std::min(config_.chunk_tokens, fits) : fits;
}

void MoeLayer::forward_chunk(const ForwardPass& pass, ForwardCache* cache, bf16* out) const {
  SubPools::Session session(*pools_, parts(), whom_to_wake(pass.plan.rows(), config_, parts()));
  require(loaded(), ErrorKind::runtime, "Weights not loaded: [forward] they were unloaded meanwhile");
  if (cache) {
    bf16* x = cache->x.as<bf16>() + static_cast<std::ptrdiff_t>(pass.first_token) * config_.hidden;
    copy_tokens(session, pass.x, pass.plan.n_tokens, config_.hidden, x);
  }
  auto kept = [&](int p) { return cache ? &cache->chunks.back().parts[static_cast<std::size_t>(p)] : nullptr; };
  if (parts() == 1) return part(0).forward(session.part(0), pass, kept(0), {nullptr, out});
  Terms terms(parts_.size());
  session.each([&](int p) {
    Scratch& scratch = session.scratch(p);
    scratch.reset();
    float* term = scratch.take<float>(static_cast<std::size_t>(pass.plan.n_tokens) * static_cast<std::size_t>(config_.hidden));
    part(p).forward(session.part(p), pass, kept(p), {term, nullptr});
    terms[static_cast<std::size_t>(p)] = term;
  });
  merge_rows(session, part(0).kernels(), terms, pass.plan.n_tokens, config_.hidden, {nullptr, out});
}

RoutePlan MoeLayer::plan_chunk(const Routing& routing, int block_rows) const {
  const std::uint8_t* own = config_.on_gpu.empty() ? nullptr : config_.on_gpu.data();
  RoutePlan plan(config_, routing, block_rows, gpu_mask_ ? gpu_mask_ : own);
  for (const RoutePlan::Block& b : plan.blocks)
    require(part(0).has(b.expert), ErrorKind::runtime, "[forward] expert ", b.expert,
            ": the mask says that it is not on the GPU, but it was there when the layer was made, so it has no weights here");
  return plan;
}

void MoeLayer::forward(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora, Dropout dropout) const {
  check_ready("forward", lora);
  check_inputs("forward", hidden, routing);
  const int step = tokens_per_pass(), block_rows = part(0).kernels().block_rows;
  for (int t = 0; t < routing.n_tokens; t += step) {
    const RoutePlan plan = plan_chunk(routing.slice(t, std::min(step, routing.n_tokens - t), config_.top_k), block_rows);
    forward_chunk({plan, t, {hidden.data + t * hidden.ld, hidden.ld}, lora, dropout}, nullptr,
                  out + static_cast<std::ptrdiff_t>(t) * config_.hidden);
  }
}

ForwardCache MoeLayer::forward_train(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora, Dropout dropout) const {
  check_ready("forward_train", lora);
  check_inputs("forward_train", hidden, routing);
  ForwardCache cache;
  cache.layer = serial_;
  cache.n_tokens = routing.n_tokens;
  cache.with_lora = lora != nullptr;
  cache.lora_version = lora ? lora->version() : 0;
  cache.dropout = dropout;
  cache.x = bf16_rows(routing.n_tokens, config_.hidden);
  const int step = tokens_per_pass(), block_rows = part(0).kernels().block_rows;
  for (int t = 0; t < routing.n_tokens; t += step) {
    RoutePlan plan = plan_chunk(routing.slice(t, std::min(step, routing.n_tokens - t), config_.top_k), block_rows);
    cache.chunks.push_back({t, std::move(plan), {}});
    ForwardCache::Chunk& chunk = cache.chunks.back();
    for (const LayerPart& p : parts_) chunk.parts.push_back(p.keep(chunk.plan.rows(), lora));
    forward_chunk({chunk.plan, t, {hidden.data + t * hidden.ld, hidden.ld}, lora, dropout}, &cache,
                  out + static_cast<std::ptrdiff_t>(t) * config_.hidden);
  }
  return cache;
}

void MoeLayer::backward(const ForwardCache& cache, Tokens grad_out, const LoraAdapter* lora, const Gradients& grads) const {
  check_ready("backward", lora);
  require(cache.layer == serial_, ErrorKind::value, "[backward] cache: got one of another layer, expected one of this layer");
  require(cache.with_lora == (lora != nullptr), ErrorKind::value, "[backward] lora: got ", lora ? "an adapter" : "none",
          ", expected what the forward had (", cache.with_lora ? "an adapter" : "none", ")");
  require(!lora || lora->version() == cache.lora_version, ErrorKind::runtime,
          "LoRA weights changed between forward and backward: [backward] ", "the adapter has version ", lora ? lora->version() : 0,
          ", the forward used ", cache.lora_version);
  if (config_.check_finite) check_finite("backward", "grad_output", grad_out, cache.n_tokens, config_.hidden);
  const bool several = parts() > 1;
  int total_rows = 0;
  for (const auto& chunk : cache.chunks) total_rows += chunk.plan.rows();

  SubPools::Session session(*pools_, parts(), whom_to_wake(2 * total_rows, config_, parts()));
  require(loaded(), ErrorKind::runtime, "Weights not loaded: [backward] they were unloaded meanwhile");
  const LoraTerms lora_terms(lora, grads, parts());
  auto gradients_of = [&](int p) {
    Gradients own = grads;
    own.lora = lora_terms.of(p);
    return own;
  };
  if (grads.lora[kDownA] || grads.base[2])
    session.each([&](int p) {
      part(p).clear_gradients(session.part(p), cache.chunks.empty() ? nullptr : &cache.chunks[0].plan, lora, gradients_of(p));
    });
  for (const auto& chunk : cache.chunks) {
    const int n = chunk.plan.n_tokens, hidden = config_.hidden, top_k = config_.top_k;
    const std::ptrdiff_t first = chunk.first_token;
    const FloatOrBf16 input = grads.input.from(first * hidden);
    float* weights = grads.weights ? grads.weights + first * top_k : nullptr;
    const BackwardPass pass{
        chunk.plan, chunk.first_token, cache.x.as<bf16>() + first * hidden, {grad_out.data + first * grad_out.ld, grad_out.ld},
        lora,       cache.dropout,     &chunk == &cache.chunks[0]};
    Terms input_terms(parts_.size()), weight_terms(parts_.size());
    session.each([&](int p) {
      const std::size_t i = static_cast<std::size_t>(p);
      Gradients own = gradients_of(p);
      own.input = input;
      own.weights = weights;
      if (several) {
        Scratch& scratch = session.scratch(p);
        scratch.reset();
        if (input)
          own.input = {input_terms[i] = scratch.take<float>(static_cast<std::size_t>(n) * static_cast<std::size_t>(hidden)), nullptr};
        if (weights) own.weights = weight_terms[i] = scratch.take<float>(static_cast<std::size_t>(n) * static_cast<std::size_t>(top_k));
      }
      part(p).backward(session.part(p), pass, chunk.parts[i], own);
    });
    if (several && input) merge_rows(session, part(0).kernels(), input_terms, n, hidden, input);
    if (several && weights) merge_rows(session, part(0).kernels(), weight_terms, n, top_k, {weights, nullptr});
  }
  lora_terms.merge(session, cache.chunks);
}

}  // namespace ktmoe
