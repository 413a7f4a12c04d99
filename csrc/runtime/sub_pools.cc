#include "runtime/sub_pools.h"

#include <algorithm>

namespace ktmoe {

SubPools::SubPools(std::vector<SubPool> pools) : taken_(pools.size()) {
  std::int64_t total = 0;
  for (const SubPool& s : pools) {
    require(s.threads > 0, ErrorKind::value, "[ThreadPool] threads of a sub-pool: got ", s.threads, ", expected at least 1");
    total += s.threads;
  }
  require(total > 0 && total <= 4096, ErrorKind::value, "[ThreadPool] threads: got ", total, ", expected 1 to 4096");
  threads_ = static_cast<int>(total);
  const int count = static_cast<int>(pools.size());
  if (count > 1) {
    std::vector<Cpus> cpus;
    for (const SubPool& s : pools) cpus.push_back(s.cpus);
    leaders_ = std::make_unique<ThreadPool>(count, threads_ - count, std::move(cpus));
  }
  for (SubPool& s : pools) {
    nodes_.push_back(s.node);
    pools_.push_back(std::make_unique<ThreadPool>(s.threads, threads_ - s.threads,
                                                  std::vector<Cpus>(static_cast<std::size_t>(s.threads), std::move(s.cpus))));
  }
}

bool SubPools::started() const {
  return std::any_of(pools_.begin(), pools_.end(), [](const auto& p) { return p->started(); });
}

int SubPools::take_part(int leader, int parts) {
  int p = leader % parts;
  while (taken_[static_cast<std::size_t>(p)].exchange(true, std::memory_order_relaxed)) p = (p + 1) % parts;
  return p;
}

SubPools::Session::Session(SubPools& pools, int parts, Wake wake) : pools_(pools) {
  if (pools.leaders_) {
    // Before anything is held: fork() holds what starting needs while it waits for running calls.
    for (const auto& p : pools.pools_) p->start();
    leaders_.emplace(*pools.leaders_, wake == Wake::nobody);
  }
  for (int p = 0; p < parts; ++p) sessions_.emplace_back(*pools.pools_[static_cast<std::size_t>(p)], wake != Wake::all);
}

}  // namespace ktmoe
