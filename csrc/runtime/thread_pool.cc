#include "runtime/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>

namespace ktmoe {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int cpus_of_process() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

// How long a worker looks for work before it sleeps: a few layers of decode. Never when there are fewer CPUs than threads.
std::chrono::microseconds spin_budget(int threads) {
  if (const char* text = std::getenv("KTMOE_SPIN_US")) return std::chrono::microseconds(std::max(0, std::atoi(text)));
  return std::chrono::microseconds(threads > cpus_of_process() ? 0 : 50);
}

// Confines the calling thread. A CPU that is gone meanwhile is no reason to fail: the thread then stays where it was.
void run_on(const Cpus& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus)
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  if (!cpus.empty()) sched_setaffinity(0, sizeof set, &set);
}

// True as soon as `ready()`; false when the budget is over.
template <class Ready>
bool spin(std::chrono::microseconds budget, Ready ready) {
  if (ready()) return true;
  if (budget.count() == 0) return false;
  const auto end = std::chrono::steady_clock::now() + budget;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Serves in arrival order.
class TicketLock {
 public:
  void lock() {
    std::unique_lock guard(mutex_);
    const unsigned mine = next_++;
    turn_.wait(guard, [&] { return serving_ == mine; });
  }
  void unlock() {
    {
      const std::lock_guard guard(mutex_);
      ++serving_;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  unsigned next_ = 0, serving_ = 0;
};

}  // namespace

// Everything that a fork leaves behind in the child lives here, so that the child can forget it as a whole.
struct ThreadPool::State {
  State(int threads, int beside, const std::vector<Cpus>& cpus)
      : spin_time(spin_budget(threads + beside)), scratch(static_cast<std::size_t>(threads)) {
    for (int i = 1; i < threads; ++i)
      workers.emplace_back([this, i, own = static_cast<std::size_t>(i) < cpus.size() ? cpus[static_cast<std::size_t>(i)] : Cpus{}] {
        run_on(own);
        work(i);
      });
  }
  ~State() {
    {
      const std::lock_guard guard(sleep_mutex);
      stop.store(true, std::memory_order_seq_cst);
    }
    wake.notify_all();
    for (auto& w : workers) w.join();
  }

  // phase: [job number 32][open 1][workers inside 31]. A worker joins only an open job, so one that wakes late is never waited for.
  static constexpr std::uint64_t kOpen = std::uint64_t{1} << 31, kInside = kOpen - 1;
  static std::uint64_t number(std::uint64_t phase) { return phase >> 32; }

  void work(int worker) {
    std::uint64_t seen = 0;
    for (;;) {
      const auto changed = [&] {
        const std::uint64_t p = phase.load(std::memory_order_acquire);
        return (number(p) != seen && (p & kOpen)) || stop.load(std::memory_order_relaxed);
      };
      if (!spin(spin_time, changed)) {
        std::unique_lock guard(sleep_mutex);
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        wake.wait(guard, [&] {
          const std::uint64_t p = phase.load(std::memory_order_seq_cst);
          return (number(p) != seen && (p & kOpen)) || stop.load(std::memory_order_seq_cst);
        });
        sleepers.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (stop.load(std::memory_order_acquire)) return;
      std::uint64_t p = phase.load(std::memory_order_acquire);
      if (number(p) == seen || !(p & kOpen)) continue;
      if (!phase.compare_exchange_strong(p, p + 1, std::memory_order_acq_rel)) continue;
      seen = number(p);
      take_tasks(worker);
      const std::uint64_t before = phase.fetch_sub(1, std::memory_order_seq_cst);
      if ((before & kInside) == 1 && !(before & kOpen) && caller_sleeps.load(std::memory_order_seq_cst)) {
        const std::lock_guard guard(done_mutex);
        done.notify_one();
      }
    }
  }

  void take_tasks(int worker) {
    for (;;) {
      const int task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= n_tasks) return;
      try {
        fn(arg, task, worker);
      } catch (...) {
        const std::lock_guard guard(error_mutex);
        if (!error) error = std::current_exception();
        next.store(n_tasks, std::memory_order_relaxed);  // the rest is not started
      }
    }
  }

  void run(int n, void (*f)(void*, int, int), void* a) {
    n_tasks = n;
    fn = f;
    arg = a;
    error = nullptr;
    next.store(0, std::memory_order_relaxed);
    if (!workers.empty()) {
      phase.store(((number(phase.load(std::memory_order_relaxed)) + 1) << 32) | kOpen, std::memory_order_seq_cst);
      if (sleepers.load(std::memory_order_seq_cst) > 0) {
        {
          const std::lock_guard guard(sleep_mutex);
        }
        wake.notify_all();
      }
    }
    take_tasks(0);
    phase.fetch_and(~kOpen, std::memory_order_seq_cst);
    const auto empty = [&] { return (phase.load(std::memory_order_seq_cst) & kInside) == 0; };
    if (!spin(std::chrono::microseconds(200), empty)) {
      std::unique_lock guard(done_mutex);
      caller_sleeps.store(true, std::memory_order_seq_cst);
      done.wait(guard, empty);
      caller_sleeps.store(false, std::memory_order_seq_cst);
    }
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  alignas(64) std::atomic<std::uint64_t> phase{0};
  alignas(64) std::atomic<int> next{0};
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false}, stop{false};
  int n_tasks = 0;
  void (*fn)(void*, int, int) = nullptr;
  void* arg = nullptr;
  std::mutex error_mutex, sleep_mutex, done_mutex;
  std::exception_ptr error;
  std::condition_variable wake, done;
  TicketLock order;
  const std::chrono::microseconds spin_time;
  std::vector<Scratch> scratch;
  Scratch shared, stage;
  std::vector<std::thread> workers;  // last: they use everything above
};

// All pools of the process, so that fork() can find them: in the order in which they were made, which is also the order in which a
// call that uses several takes them. Leaked: fork may come at any time, exit included.
struct ForkHandlers {
  std::mutex mutex;
  std::vector<ThreadPool*> pools;

  static ForkHandlers& get() {
    static ForkHandlers* const self = [] {
      auto* made = new ForkHandlers;
      pthread_atfork([] { get().before(); }, [] { get().after_in_parent(); }, [] { get().after_in_child(); });
      return made;
    }();
    return *self;
  }

 private:
  void before() {
    mutex.lock();
    for (ThreadPool* p : pools)
      if (auto* s = p->state_.load()) s->order.lock();
  }
  void after_in_parent() {
    for (ThreadPool* p : pools)
      if (auto* s = p->state_.load()) s->order.unlock();
    mutex.unlock();
  }
  void after_in_child() {
    for (ThreadPool* p : pools) p->state_.store(nullptr);  // leaked on purpose: its threads do not exist here
    mutex.unlock();
  }
};

ThreadPool::ThreadPool(int threads, int beside, std::vector<Cpus> cpus) : threads_(threads), beside_(beside), cpus_(std::move(cpus)) {
  require(threads_ > 0 && threads_ <= 4096, ErrorKind::value, "[ThreadPool] threads: got ", threads_, ", expected 1 to 4096");
  auto& all = ForkHandlers::get();
  const std::lock_guard guard(all.mutex);
  all.pools.push_back(this);
}

ThreadPool::~ThreadPool() {
  {
    auto& all = ForkHandlers::get();
    const std::lock_guard guard(all.mutex);
    std::erase(all.pools, this);
  }
  delete state_.load();
}

ThreadPool::State& ThreadPool::state() {
  if (State* s = state_.load(std::memory_order_acquire)) return *s;
  const std::lock_guard guard(ForkHandlers::get().mutex);
  if (!state_.load(std::memory_order_acquire)) state_.store(new State(threads_, beside_, cpus_), std::memory_order_release);
  return *state_.load(std::memory_order_acquire);
}

ThreadPool::Session::Session(ThreadPool& pool, bool serial) : pool_(pool), state_(pool.state()), serial_(serial) {
  state_.order.lock();
  try {
    state_.shared.reset();  // may allocate
  } catch (...) {
    state_.order.unlock();
    throw;
  }
}
ThreadPool::Session::~Session() {
  state_.order.unlock();
}
Scratch& ThreadPool::Session::scratch(int worker) {
  return state_.scratch[static_cast<std::size_t>(worker)];
}
Scratch& ThreadPool::Session::shared() {
  return state_.shared;
}
Scratch& ThreadPool::Session::stage() {
  return state_.stage;
}
void ThreadPool::Session::run(int n, void (*fn)(void*, int, int), void* arg) {
  state_.run(n, fn, arg);
}

}  // namespace ktmoe
