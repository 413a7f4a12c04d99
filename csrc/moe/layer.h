// MoeLayer: the routed experts of one layer: loading, forward, training forward, backward.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/serial_number.h"
#include "kernels/kernel_api.h"
#include "moe/cache.h"
#include "moe/config.h"
#include "moe/expert.h"
#include "moe/lora.h"
#include "moe/route.h"
#include "runtime/thread_pool.h"

namespace ktmoe {

struct Tokens {  // bf16 [n][hidden], rows at `ld` elements
  const bf16* data;
  std::ptrdiff_t ld;
};

struct Gradients {  // every pointer may be null
  bf16* input16;    // [n_tokens][hidden], or
  float* input32;
  float* weights;                // [n_tokens][top_k]
  std::array<float*, 6> lora{};  // [n_experts][...] in the order of LoraTensor; all that exist, or none
};

class MoeLayer {
 public:
  MoeLayer(std::shared_ptr<ThreadPool> pool, MoeConfig config);

  const MoeConfig& config() const { return config_; }
  const KernelTable& kernels() const { return kernels_; }
  ThreadPool& pool() const { return *pool_; }

  // gate, up [inter][hidden], down [hidden][inter], dense; gate is null where the activation has none. All experts have biases or none.
  void load_expert(int expert, const bf16* gate, const bf16* up, const bf16* down, const Biases& biases = {});
  bool loaded() const { return missing_ == 0; }
  void unload();
  std::size_t packed_bytes() const;
  void dequantize(int expert, float* gate, float* up, float* down) const;
  Expert expert(int e) const;

  // out: [n_tokens][hidden] dense. lora may be null. Throws before any work on bad routing.
  void forward(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora) const;
  ForwardCache forward_train(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora) const;
  void backward(const ForwardCache& cache, Tokens grad_out, const LoraAdapter* lora, const Gradients& grads) const;

 private:
  void forget_weights();
  void check_ready(const char* function, const LoraAdapter* lora) const;
  int tokens_per_pass() const;
  std::size_t expert_offset(int e) const;
  std::size_t bias_floats() const;
  void check_biases(int expert, const Biases& biases) const;
  void store_biases(int expert, const Biases& biases);

  const std::uint64_t serial_ = next_serial_number();
  const std::shared_ptr<ThreadPool> pool_;
  const MoeConfig config_;
  const KernelTable& kernels_;
  const PackedLayout gate_up_, down_;
  const std::size_t expert_bytes_;
  std::vector<int> slot_;          // [n_experts] position in `data_`, -1 on the GPU
  AlignedBuffer data_;             // touched, and so paid for, expert by expert
  AlignedBuffer biases_;           // fp32 [slots][bias_floats()], or empty
  std::vector<std::uint8_t> has_;  // [n_experts]
  int missing_ = 0;
};

}  // namespace ktmoe
