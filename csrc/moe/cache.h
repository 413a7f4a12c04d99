// ForwardCache: what one backward needs of one forward; the caller owns it.
//
// Per token: x (2 hidden bytes). Per row (token, slot): gate and up before the activation (4 inter bytes, 2 without a gate,
// padded to whole panels) and, in each part of the layer, the LoRA activations U, already scaled (6 rank bytes, 4 without a gate).
// Everything else is recomputed; the router gradient is <h, dh>, and <dY, down bias> where there is one.
#pragma once

#include <vector>

#include "base/recycled_buffer.h"
#include "moe/dropout.h"
#include "moe/route.h"

namespace ktmoe {

inline RecycledBuffer bf16_rows(int rows, int columns, int node = -1) {
  return {checked_mul(checked_mul(static_cast<std::size_t>(rows), static_cast<std::size_t>(columns)), sizeof(bf16)), node};
}

struct ForwardCache {
  struct Kept {                // by one part of the layer
    RecycledBuffer gate_up;    // bf16 [rows][32 * gate/up panels]
    RecycledBuffer u_gate_up;  // bf16 [rows][2 rank (rank without a gate), padded to 32], empty without LoRA
    RecycledBuffer u_down;     // bf16 [rows][rank, padded to 32]
  };
  struct Chunk {
    int first_token;
    RoutePlan plan;
    std::vector<Kept> parts;
  };
  std::uint64_t layer = 0;  // serial number, to refuse a foreign cache
  int n_tokens = 0;
  bool with_lora = false;
  std::uint64_t lora_version = 0;
  Dropout dropout;
  RecycledBuffer x;  // bf16 [n_tokens][hidden]
  std::vector<Chunk> chunks;

  std::size_t bytes() const {
    std::size_t total = x.size();
    for (const Chunk& c : chunks) {
      total += 12 * c.plan.token.size() + 8 * c.plan.row_of.size();
      for (const Kept& k : c.parts) total += k.gate_up.size() + k.u_gate_up.size() + k.u_down.size();
    }
    return total;
  }
};

}  // namespace ktmoe
