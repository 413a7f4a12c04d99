// SubPools: the threads of one engine, in sub-pools: usually one for each NUMA node.
//
// A call works on parts 0, 1, ...: part p runs on sub-pool p. All parts run at once, each led by one thread that is worker 0 of its
// sub-pool: the caller leads part 0, a thread of its own each other one; a leader that has not woken up when another one is done
// is not waited for. Calls are served in arrival order, one Session at a time, however many parts they have.
#pragma once

#include <deque>
#include <optional>

#include "runtime/thread_pool.h"

namespace ktmoe {

struct SubPool {
  int threads;
  int node = -1;   // whose memory holds what belongs to its part; -1: the operating system decides
  Cpus cpus = {};  // where its threads run (never the caller's)
};

// Whom a call wakes: small work is done before somebody who sleeps has come.
enum class Wake { nobody, leaders, all };

class SubPools {
 public:
  explicit SubPools(std::vector<SubPool> pools);

  int count() const { return static_cast<int>(pools_.size()); }
  int threads() const { return threads_; }
  int node(int part) const { return nodes_[static_cast<std::size_t>(part)]; }
  bool started() const;

  // The first `parts` sub-pools for the duration of one call.
  class Session {
   public:
    Session(SubPools& pools, int parts, Wake wake = Wake::all);

    int parts() const { return static_cast<int>(sessions_.size()); }
    ThreadPool::Session& part(int p) { return sessions_[static_cast<std::size_t>(p)]; }
    // For what a part hands to the others: not touched by passes on the sub-pool itself. With several parts only.
    Scratch& scratch(int p) { return leaders_->scratch(p); }

    // f(part) for all parts at once. The first exception is rethrown after all of them have stopped.
    template <class F>
    void each(F&& f) {
      if (parts() == 1) return f(0);
      for (auto& taken : pools_.taken_) taken.store(false, std::memory_order_relaxed);
      leaders_->parallel_for(parts(), [&](int, int leader) { f(pools_.take_part(leader, parts())); });
    }

    // f(task, scratch) for task in [0, n) on the workers of all parts; those of part p get tasks that follow each other.
    template <class F>
    void parallel_for(int n, F&& f) {
      auto share = [&](int p, int first, int last) {
        part(p).parallel_for(last - first, [&](int i, int worker) {
          Scratch& scratch = part(p).scratch(worker);
          scratch.reset();
          f(first + i, scratch);
        });
      };
      if (n < parts()) return share(0, 0, n);
      const std::int64_t tasks = n;
      each([&](int p) { share(p, static_cast<int>(tasks * p / parts()), static_cast<int>(tasks * (p + 1) / parts())); });
    }

   private:
    SubPools& pools_;
    std::optional<ThreadPool::Session> leaders_;  // first, and released last: who holds it is alone on the engine
    std::deque<ThreadPool::Session> sessions_;
  };

 private:
  int take_part(int leader, int parts);  // the leader's own one if nobody has it

  int threads_ = 0;
  std::vector<int> nodes_;
  std::unique_ptr<ThreadPool> leaders_;  // with several sub-pools; made before them, because calls take it first (see ForkHandlers)
  std::vector<std::unique_ptr<ThreadPool>> pools_;
  std::vector<std::atomic<bool>> taken_;  // parts of the running `each`
};

}  // namespace ktmoe
