// RoutePlan: which rows each expert computes. A row is one (token, slot) pair; rows are sorted by expert, then by token and slot, so
// the plan, and with it every sum, depends on the routing alone.
#pragma once

#include <cstdint>
#include <vector>

#include "moe/config.h"

namespace ktmoe {

struct Routing {  // of n_tokens tokens; either ids pointer, either weights pointer
  int n_tokens;
  const std::int32_t* ids32;
  const std::int64_t* ids64;
  const float* weights32;
  const bf16* weights16;

  std::int64_t id(std::size_t i) const { return ids32 ? ids32[i] : ids64[i]; }
  float weight(std::size_t i) const { return weights32 ? weights32[i] : to_float(weights16[i]); }
  Routing slice(int first, int count, int top_k) const;
  // ValueError naming position and value for ids other than [-1, n_experts].
  void check(const MoeConfig& config) const;
};

struct RoutePlan {
  // Rows [begin, begin + rows) of one expert, at most block_rows of them: as few blocks as can be, and even ones, since each reads all
  // weights of the expert, which takes a block of few rows longer than it computes.
  struct Block {
    int expert, begin, rows;
  };

  // on_gpu: [n_experts], 1 = not computed here, or null.
  RoutePlan(const MoeConfig& config, const Routing& routing, int block_rows, const std::uint8_t* on_gpu);

  int n_tokens, top_k;
  std::vector<std::int32_t> token;   // [rows]
  std::vector<float> weight;         // [rows]
  std::vector<std::int32_t> row_of;  // [n_tokens * top_k], -1: not computed here
  std::vector<float> slot_weight;    // [n_tokens * top_k]
  std::vector<Block> blocks;         // in expert order
  std::vector<int> expert_blocks;    // first block of each active expert, and one past the last

  int rows() const { return static_cast<int>(token.size()); }
  int active_experts() const { return static_cast<int>(expert_blocks.size()) - 1; }
  int most_rows() const;  // of any block
};

}  // namespace ktmoe
