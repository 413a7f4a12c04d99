// MoeLayer: the routed experts of one layer: loading, forward, training forward, backward. It cuts the work into chunks of tokens, has
// its parts compute each of them at once, one on each sub-pool, and adds up what they give.
#pragma once

#include <memory>
#include <vector>

#include "base/serial_number.h"
#include "moe/cache.h"
#include "moe/config.h"
#include "moe/part.h"
#include "runtime/sub_pools.h"

namespace ktmoe {

class ExpertPacker;

class MoeLayer {
 public:
  MoeLayer(std::shared_ptr<SubPools> pools, MoeConfig config);
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  const MoeConfig& config() const { return config_; }
  int parts() const { return static_cast<int>(parts_.size()); }
  const Slice& slice(int part) const { return parts_[static_cast<std::size_t>(part)].slice(); }

  // gate, up [inter][hidden], down [hidden][inter], dense; gate is null where the activation has none. All experts have biases or none.
  void load_expert(int expert, const bf16* gate, const bf16* up, const bf16* down, const Biases& biases = {});
  // Published formats: the parts of each matrix as FormatInfo describes them (bf16: one part, the bf16 numbers), rows dense. A number
  // that is not finite is a ValueError naming matrix and row; the expert is then not loaded.
  void load_expert_raw(int expert, const RawBlock& gate, const RawBlock& up, const RawBlock& down, const Biases& biases = {});
  bool loaded() const;
  void unload();
  std::size_t packed_bytes() const;

  // The packed bytes of an expert depend on the weights alone: not on the ISA, the threads, the parts or the machine.
  std::size_t expert_bytes() const { return layout_.bytes; }
  void read_expert(int expert, std::byte* out) const;
  // Expert e lives at packed + expert_bytes() * row[e] from now on; the caller keeps that memory, 64-byte aligned, for as long as
  // the layer. GPU experts are skipped. Replaces all experts. A layer of several parts copies the bytes, each to the memory of its part.
  // biases: as for one expert, n_rows of them one after another; copied.
  void attach(const std::byte* packed, int n_rows, const std::vector<int>& row, const Biases& biases = {});
  void dequantize(int expert, float* gate, float* up, float* down) const;

  // From now on [n_experts] bytes of the caller say before each forward which experts are computed elsewhere (1) and skipped here.
  // Experts that the configuration had on the GPU have no memory here and can not come back.
  void share_gpu_mask(const std::uint8_t* mask) { gpu_mask_ = mask; }

  // out: [n_tokens][hidden] dense. lora may be null. Throws before any work on bad routing, and on what config.check_finite refuses.
  void forward(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora, Dropout dropout = {}) const;
  ForwardCache forward_train(Tokens hidden, const Routing& routing, bf16* out, const LoraAdapter* lora, Dropout dropout = {}) const;
  void backward(const ForwardCache& cache, Tokens grad_out, const LoraAdapter* lora, const Gradients& grads) const;

  SubPools& pools() const { return *pools_; }

 private:
  LayerPart& part(int p) { return parts_[static_cast<std::size_t>(p)]; }
  const LayerPart& part(int p) const { return parts_[static_cast<std::size_t>(p)]; }
  void load(const char* function, int expert, const ExpertPacker& packer, const Biases& biases);
  void check_biases(int expert, const Biases& biases) const;
  void check_expert(const char* function, int expert) const;
  void check_ready(const char* function, const LoraAdapter* lora) const;
  void check_inputs(const char* function, Tokens hidden, const Routing& routing) const;
  RoutePlan plan_chunk(const Routing& routing, int block_rows) const;
  int tokens_per_pass() const;
  // cache: of a training pass, whose last chunk this is; or null.
  void forward_chunk(const ForwardPass& pass, ForwardCache* cache, bf16* out) const;

  const std::uint64_t serial_ = next_serial_number();
  const std::shared_ptr<SubPools> pools_;
  const MoeConfig config_;
  const ExpertLayout layout_;  // of packed bytes as the outside sees them
  std::vector<LayerPart> parts_;
  const std::uint8_t* gpu_mask_ = nullptr;
};

}  // namespace ktmoe
