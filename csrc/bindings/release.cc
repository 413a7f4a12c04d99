#include "bindings/release.h"

#include <atomic>
#include <utility>

namespace ktmoe {
namespace {
std::atomic<Releasable*> list{nullptr};  // without a lock, because fork() may come between any two instructions of another thread
}

void release_later(Releasable* object) {
  object->next = list.load(std::memory_order_relaxed);
  while (!list.compare_exchange_weak(object->next, object, std::memory_order_release, std::memory_order_relaxed)) {
  }
}

void release_now() {
  for (Releasable* o = list.exchange(nullptr, std::memory_order_acquire); o;) delete std::exchange(o, o->next);
}

}  // namespace ktmoe
