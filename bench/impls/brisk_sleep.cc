// Preloaded into a process that measures kt-kernel. The idle threads of its pool (named numa_*) spin for 50 ms by
// std::chrono::system_clock before they sleep, and its queue thread needs one of their cores to see that a call has
// ended: without a core to spare every call lasts a scheduler slice. For those threads the clock runs 10,000 times
// faster, so that they sleep after 5 us, and its kernels are measured instead of its waiting.
#include <pthread.h>
#include <time.h>

#include <chrono>
#include <cstring>

namespace {

constexpr long long kSpeed = 10000;
constexpr int kLooks = 100;  // a thread gets its name soon after its start

struct Thread {
  int looks = 0;
  bool pool = false;
  long long origin = 0;
};
thread_local Thread me;

}  // namespace

std::chrono::system_clock::time_point std::chrono::_V2::system_clock::now() noexcept {
  timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  long long ns = time.tv_sec * 1000000000LL + time.tv_nsec;
  if (!me.pool && me.looks < kLooks) {
    ++me.looks;
    char name[16] = {};
    pthread_getname_np(pthread_self(), name, sizeof name);
    me.pool = std::strncmp(name, "numa_", 5) == 0;
    me.origin = ns;
  }
  if (me.pool) ns = me.origin + kSpeed * (ns - me.origin);
  return time_point(duration(ns));
}
