// LayerPart: a slice of every expert along inter: its weights, and the passes over one chunk of tokens. A layer has one part for each
// sub-pool, usually a single one.
//
// Biases, LoRA and gradients come as tensors of the whole layer, of which a part uses its rows or columns. What is a sum over the columns
// of h (outputs; gradients of x, of routing weights, of LoRA's gate A, up A and down B) it gives as its own term of that sum.
#pragma once

#include <array>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/kernel_api.h"
#include "moe/cache.h"
#include "moe/expert.h"
#include "moe/lora.h"
#include "moe/partition.h"
#include "runtime/thread_pool.h"

namespace ktmoe {

struct Tokens {  // bf16 [n][hidden], rows at `ld` elements
  const bf16* data;
  std::ptrdiff_t ld;
};

struct FloatOrBf16 {  // at most one is set
  float* f32 = nullptr;
  bf16* b16 = nullptr;
  explicit operator bool() const { return f32 || b16; }
  FloatOrBf16 from(std::ptrdiff_t element) const { return {f32 ? f32 + element : nullptr, b16 ? b16 + element : nullptr}; }
};

// [n_experts][rows][columns] of fp32, whose columns follow each other; strides in elements.
struct LoraGradient {
  float* data = nullptr;
  std::ptrdiff_t expert = 0, row = 0;
  explicit operator bool() const { return data; }
  float* at(std::ptrdiff_t e, std::ptrdiff_t i, std::ptrdiff_t j) const { return data + e * expert + i * row + j; }
};

struct Gradients {           // every one may be absent
  FloatOrBf16 input;         // [n_tokens][hidden]
  float* weights = nullptr;  // [n_tokens][top_k]
  // In the order of LoraTensor; all that exist, or none; only with an adapter. That of up A may be that of gate A: it gets their sum.
  std::array<LoraGradient, 6> lora{};
  // Of the base weights: gate (absent without one), up [n_experts][inter][hidden], down [n_experts][hidden][inter], or all absent.
  std::array<FloatOrBf16, 3> base{};
};

// A chunk of tokens on its way forward, and back.
struct ForwardPass {
  const RoutePlan& plan;
  int first_token;  // of the chunk in the call, for dropout
  Tokens x;         // of the chunk
  const LoraAdapter* lora;
  Dropout dropout;
};
struct BackwardPass {
  const RoutePlan& plan;
  int first_token;
  const bf16* x;    // [n_tokens][hidden] of the chunk
  Tokens grad_out;  // of the chunk
  const LoraAdapter* lora;
  Dropout dropout;
  bool first_chunk;  // gradients of weights are written; by later chunks added to
};

class LayerPart {
 public:
  // node: as in SubPool.
  LayerPart(const MoeConfig& layer, Slice slice, int node);

  const MoeConfig& config() const { return config_; }  // of the part: inter is its own
  const Slice& slice() const { return slice_; }
  const ExpertLayout& layout() const { return layout_; }
  const KernelTable& kernels() const { return kernels_; }

  // --- weights ---
  bool has(int e) const { return at_[static_cast<std::size_t>(e)] != nullptr; }
  bool has_biases() const { return biases_.data() != nullptr; }
  int missing() const { return missing_; }
  std::size_t bytes() const;
  Expert expert(int e) const;
  const std::byte* packed(int e) const { return at_[static_cast<std::size_t>(e)]; }
  // The part's own memory for the packed bytes of an expert that is not on the GPU.
  std::byte* memory(int e);
  void store_biases(int e, const Biases& biases);
  // The expert's packed bytes, kept by somebody for as long as they are used here; null: it is missing.
  void place(int e, const std::byte* at);
  void forget();
  // Its rows and columns of the layer's gate, up [inter][hidden] and down [hidden][inter]; gate may be null.
  void dequantize(int e, float* gate, float* up, float* down) const;

  // --- passes ---
  // out: [n_tokens][hidden] dense. kept: made by `keep` for the rows of this pass, or null.
  void forward(ThreadPool::Session& session, const ForwardPass& pass, ForwardCache::Kept* kept, FloatOrBf16 out) const;
  ForwardCache::Kept keep(int rows, const LoraAdapter* lora) const;
  // Gradients of experts that the first chunk (null: there is none) does not reach start from zero; those of LoRA that are this part's
  // own term (see above) must be zero already unless the part leads.
  void clear_gradients(ThreadPool::Session& session, const RoutePlan* first, const LoraAdapter* lora, const Gradients& grads) const;
  // input and weights of `grads`: of the chunk.
  void backward(ThreadPool::Session& session, const BackwardPass& pass, const ForwardCache::Kept& kept, const Gradients& grads) const;

 private:
  std::size_t bias_floats() const;
  std::size_t slots() const;

  const Slice slice_;
  const int node_;
  const MoeConfig config_;
  const KernelTable& kernels_;
  const ExpertLayout layout_;
  std::vector<int> slot_;             // [n_experts] position in `data_` and `biases_`, -1 on the GPU
  AlignedBuffer data_;                // touched, and so paid for, expert by expert
  AlignedBuffer biases_;              // fp32 [slots][bias_floats()], or empty
  std::vector<const std::byte*> at_;  // [n_experts] packed bytes, in `data_` or elsewhere; null: not loaded
  int missing_ = 0;
};

}  // namespace ktmoe
