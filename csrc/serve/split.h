// Which experts of a batch may run later: the definition is in src/ktmoe/deferred.py, this is the same on a queue's thread.
#pragma once

#include <vector>

#include "moe/route.h"

namespace ktmoe {

struct SplitRouting {
  std::vector<std::int32_t> now, later;  // [n_tokens][top_k]; -1 where the entry belongs to the other one, or to neither

  // The protected_k best-weighted entries of each token protect their experts for the whole batch; `now` has the protected experts.
  void assign(const MoeConfig& config, const Routing& routing, int protected_k);
};

}  // namespace ktmoe
