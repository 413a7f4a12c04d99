// Expert: the matrices of one expert, each packed once, and its biases.
#pragma once

#include "format/packed_matrix.h"

namespace ktmoe {

struct Expert {
  PackedMatrix gate_up, down;  // gate and up are paired; up alone, plain, where the activation has no gate
  // fp32, one value for each panel column (zero where there is none); null without biases.
  const float *gate_up_bias, *down_bias;
};

// What load_expert takes: fp32, gate and up [inter], down [hidden]; null counts as zeros, all null means no biases.
struct Biases {
  const float *gate, *up, *down;
  bool any() const { return gate || up || down; }
};

}  // namespace ktmoe
