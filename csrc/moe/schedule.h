// When work is shared, and how. Only speed depends on these answers, never a result.
#pragma once

#include "moe/route.h"
#include "runtime/sub_pools.h"

namespace ktmoe {

// Waking a sleeping worker costs some 50 us, in which one core multiplies half a million weights.
inline Wake whom_to_wake(int rows, const MoeConfig& config, int parts) {
  constexpr double kWorthWaking = 5e5;
  const double work = static_cast<double>(rows) * 3 * config.hidden * config.inter;
  if (work < kWorthWaking) return Wake::nobody;
  return work < kWorthWaking * parts ? Wake::leaders : Wake::all;
}

// Enough tasks for every worker, and none so large that the others would wait for it.
inline bool owner_pays(int tasks, int most_rows, int rows, int threads) {
  return threads == 1 || (tasks >= 3 * threads && most_rows * 2 * threads <= rows);
}

}  // namespace ktmoe
