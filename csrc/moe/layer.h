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

struct FloatOrBf16 {  // at most one is set
  float* f32 = nullptr;
  bf16* b16 = nullptr;
  explicit operator bool() const { return f32 || b16; }
};

struct Gradients {  // every pointer may be null
  bf16* input16;    // [n_tokens][hidden], or
  float* input32;
  float* weights;                // [n_tokens][top_k]
  std::array<float*, 6> lora{};  // [n_experts][...] in the order of LoraTensor; all that exist, or none; only with an adapter
  // Of the base weights: gate (null without one), up [n_experts][inter][hidden], down [n_experts][hidden][inter], or all null.
  std::array<FloatOrBf16, 3> base{};
};

class MoeLayer {
 public:
  MoeLayer(std::shared_ptr<ThreadPool> pool, MoeConfig config);

  const MoeConfig& config() const { return config_; }
  const KernelTable& kernels() const { return kernels_; }
  ThreadPool& pool() const { return *pool_; }

  // gate, up [inter][hidden], down [hidden][inter], dense; gate is null where the activation has none. All experts have biases or none.
  void load_expert(int expert, const bf16* gate, const bf16* up, const bf16* down, const Biases& biases = {});
  // Published formats: the parts of each matrix as FormatInfo describes them (bf16: one part, the bf16 numbers), rows dense. A number
  // that is not finite is a ValueError naming matrix and row; the expert is then not loaded.
  void load_expert_raw(int expert, const RawBlock& gate, const RawBlock& up, const RawBlock& down, const Biases& biases = {});
  bool loaded() const { return missing_ == 0; }
  void unload();
  std::size_t packed_bytes() const;

  // The packed bytes of an expert depend on the weights alone: not on the ISA, the threads or the machine.
  std::size_t expert_bytes() const { return expert_bytes_; }
  void read_expert(int expert, std::byte* out) const;
  // Expert e lives at packed + expert_bytes() * row[e] from now on; the caller keeps that memory, 64-byte aligned, for as long as
  // the layer. GPU experts are skipped. Replaces all experts. biases: as for one expert, n_rows of them one after another; copied.
  void attach(const std::byte* packed, int n_rows, const std::vector<int>& row, const Biases& biases = {});
  void dequantize(int expert, float* gate, float* up, float* down) const;
  Expert expert(int e) const;

  // out: [n_tokens][hidden] dense. lora may be null. Throws before any work on bad routing.
  void forward(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora, Dropout dropout = {}) const;
  ForwardCache forward_train(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora, Dropout dropout = {}) const;
  void backward(const ForwardCache& cache, Tokens grad_out, const LoraAdapter* lora, const Gradients& grads) const;

 private:
  void forget_weights();
  void check_ready(const char* function, const LoraAdapter* lora) const;
  int tokens_per_pass() const;
  void check_expert(const char* function, int e) const;
  void place(int e, const std::byte* at);
  template <class GateUp, class Down>
  void fill_expert(const char* function, int e, const Biases& biases, GateUp gate_up, Down down);
  std::size_t bias_floats() const;
  void check_biases(int expert, const Biases& biases) const;
  void store_biases(int expert, const Biases& biases);

  const std::uint64_t serial_ = next_serial_number();
  const std::shared_ptr<ThreadPool> pool_;
  const MoeConfig config_;
  const KernelTable& kernels_;
  const PackedLayout gate_up_, down_;
  const std::size_t expert_bytes_;
  std::vector<int> slot_;             // [n_experts] position in `data_` and `biases_`, -1 on the GPU
  AlignedBuffer data_;                // touched, and so paid for, expert by expert
  AlignedBuffer biases_;              // fp32 [slots][bias_floats()], or empty
  std::vector<const std::byte*> at_;  // [n_experts] packed bytes, in `data_` or attached; null: not loaded
  int missing_ = 0;
};

}  // namespace ktmoe
