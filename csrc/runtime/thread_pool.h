// ThreadPool: workers that share the tasks of a call.
//
// The caller takes part as worker 0 and never waits for a worker that has not started: whoever arrives first takes the next task.
// Workers look for work for a bounded time after a job and then sleep, so an idle engine uses no CPU.
// Calls from several threads are served in arrival order, one Session at a time.
// fork(): the parent's running call is waited for; the child forgets the threads (they do not exist there) and starts its own on
// first use. Nothing joins at process exit: parked threads end with the process.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "runtime/scratch.h"

namespace ktmoe {

using Cpus = std::vector<int>;  // logical CPUs; none: anywhere

class ThreadPool {
  struct State;

 public:
  // beside: threads of other pools that work at the same time: nobody waits actively where all of them exceed the CPUs.
  // cpus[i]: where worker i runs. The caller's thread, worker 0, stays where it is; so do workers beyond the end.
  explicit ThreadPool(int threads, int beside = 0, std::vector<Cpus> cpus = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  void start() { state(); }  // the threads, if they do not exist; a Session does it too
  bool started() const { return state_.load(std::memory_order_acquire) != nullptr; }

  // The pool for the duration of one call.
  class Session {
   public:
    // serial: the work is too small to wake anybody; the caller does all of it.
    explicit Session(ThreadPool& pool, bool serial = false);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    int threads() const { return serial_ ? 1 : pool_.threads(); }
    // f(task, worker) for task in [0, n), in any order, on any worker. The first exception is rethrown after all workers have stopped.
    template <class F>
    void parallel_for(int n, F&& f) {
      using Fn = std::remove_reference_t<F>;
      if (serial_ || n <= 1) {
        for (int i = 0; i < n; ++i) f(i, 0);
        return;
      }
      run(n, [](void* arg, int task, int worker) { (*static_cast<Fn*>(arg))(task, worker); }, &f);
    }
    Scratch& scratch(int worker);  // of one worker
    Scratch& shared();             // of the call
    Scratch& stage();              // of the call, for what is taken and reset within it

   private:
    friend class ThreadPool;
    void run(int n, void (*fn)(void*, int, int), void* arg);
    ThreadPool& pool_;
    State& state_;
    const bool serial_;
  };

 private:
  friend struct ForkHandlers;
  State& state();  // starts the threads if they do not exist (yet, or any more after fork)

  const int threads_, beside_;
  const std::vector<Cpus> cpus_;
  std::atomic<State*> state_{nullptr};
};

}  // namespace ktmoe
