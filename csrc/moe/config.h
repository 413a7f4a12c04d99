// MoeConfig: the validated shape of one layer.
#pragma once

#include <vector>

#include "base/error.h"
#include "base/isa.h"
#include "format/format.h"
#include "kernels/activation.h"

namespace ktmoe {

struct MoeConfig {
  int n_experts;
  int top_k;
  int hidden;
  int inter;
  WeightFormat format;       // of gate and up
  WeightFormat down_format;  // of down
  Isa isa;
  int chunk_tokens;                  // most tokens of one pass; 0: only the bound on scratch counts
  std::vector<std::uint8_t> on_gpu;  // [n_experts], 1 = not computed here and no memory; or empty
  Activation activation = {};
  bool check_finite = false;  // inputs that are not finite are errors

  bool gpu(int expert) const { return !on_gpu.empty() && on_gpu[static_cast<std::size_t>(expert)]; }

  void validate() const {
    auto between = [](const char* name, int got, int low, int high) {
      require(got >= low && got <= high, ErrorKind::value, "[MoeLayer] ", name, ": got ", got, ", expected ", low, " to ", high);
    };
    between("n_experts", n_experts, 1, 65536);
    between("top_k", top_k, 1, n_experts);
    between("hidden", hidden, 1, 65536);  // int32 sums of int8 products cannot overflow up to here
    between("inter", inter, 1, 65536);
    require(chunk_tokens >= 0, ErrorKind::value, "[MoeLayer] chunk_tokens: got ", chunk_tokens, ", expected 0 or more");
    require(on_gpu.empty() || on_gpu.size() == static_cast<std::size_t>(n_experts), ErrorKind::value, "[MoeLayer] on_gpu: got ",
            on_gpu.size(), " entries, expected ", n_experts);
  }
};

}  // namespace ktmoe
