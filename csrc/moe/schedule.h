// When work is shared, and how. Only speed depends on these answers, never a result.
#pragma once

#include "moe/route.h"

namespace ktmoe {

// Waking a sleeping worker costs some 50 us, in which one core multiplies half a million weights.
inline bool too_small_to_share(int rows, const MoeConfig& config) {
  return static_cast<double>(rows) * 3 * config.hidden * config.inter < 5e5;
}

// Enough tasks for every worker, and none so large that the others would wait for it.
inline bool owner_pays(int tasks, int most_rows, int rows, int threads) {
  return threads == 1 || (tasks >= 3 * threads && most_rows * 2 * threads <= rows);
}

}  // namespace ktmoe
