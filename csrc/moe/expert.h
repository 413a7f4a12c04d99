// Expert: gate and up (paired) and down of one expert, each packed once.
#pragma once

#include "format/packed_matrix.h"

namespace ktmoe {

struct Expert {
  PackedMatrix gate_up, down;
};

}  // namespace ktmoe
