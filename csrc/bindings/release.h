// Objects that hold Python references but may be dropped by threads that never ask for the GIL, as the queue's thread and those of the
// CUDA driver: they wait in a list until a caller comes by with the GIL.
#pragma once

#include <memory>

namespace ktmoe {

struct Releasable {
  virtual ~Releasable() = default;
  Releasable* next = nullptr;
};

void release_later(Releasable* object);  // from any thread
void release_now();                      // with the GIL: deletes what is in the list

template <class T>  // T derives from Releasable
std::shared_ptr<T> share_releasable(std::unique_ptr<T> object) {
  return std::shared_ptr<T>(object.release(), &release_later);
}

struct ReleaseAtExit {  // of a scope that ends with the GIL
  ~ReleaseAtExit() { release_now(); }
};

}  // namespace ktmoe
