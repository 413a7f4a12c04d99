#include "base/recycled_buffer.h"

#include <sys/mman.h>

#include <list>
#include <mutex>

namespace ktmoe {
namespace {

// Who finds the lock taken goes without: no call waits here, and none in a child that was forked while it was held.
class Waiting {
 public:
  static Waiting& get() {
    static Waiting* const self = new Waiting;  // leaked: buffers may outlive static objects
    return *self;
  }

  AlignedBuffer take(std::size_t bytes, int node) {
    AlignedBuffer memory;
    {
      const std::unique_lock guard(mutex_, std::try_to_lock);
      if (guard) memory = find(bytes, node);
      const std::size_t now = in_use_ += memory.data() ? memory.size() : bytes;
      for (std::size_t most = most_; most < now && !most_.compare_exchange_weak(most, now);) {
      }
      if (guard) drop_oldest();
    }
    if (memory.data()) return memory;
    try {
      return AlignedBuffer(bytes);
    } catch (...) {
      in_use_ -= bytes;
      throw;
    }
  }

  void give(AlignedBuffer memory, int node) {
    in_use_ -= memory.size();
    if (memory.size() < AlignedBuffer::kMapFrom) return;                // the heap does the same for itself
    if (madvise(memory.data(), memory.size(), MADV_FREE) != 0) return;  // a system that could not have it back gets it now
    const std::unique_lock guard(mutex_, std::try_to_lock);
    if (!guard) return;
    buffers_.push_back({std::move(memory), node});
    waiting_ += buffers_.back().memory.size();
    drop_oldest();
  }

  std::size_t bytes() const { return waiting_; }

 private:
  struct Buffer {
    AlignedBuffer memory;
    int node;
  };

  // The smallest that fits and wastes no more than a quarter, or an empty one.
  AlignedBuffer find(std::size_t bytes, int node) {
    auto best = buffers_.end();
    for (auto it = buffers_.begin(); it != buffers_.end(); ++it) {
      const std::size_t size = it->memory.size();
      if (it->node == node && size >= bytes && size - bytes <= bytes / 4 && (best == buffers_.end() || size < best->memory.size()))
        best = it;
    }
    if (best == buffers_.end()) return {};
    AlignedBuffer memory = std::move(best->memory);
    buffers_.erase(best);
    waiting_ -= memory.size();
    return memory;
  }

  void drop_oldest() {
    for (; !buffers_.empty() && in_use_ + waiting_ > most_; buffers_.pop_front()) waiting_ -= buffers_.front().memory.size();
  }

  std::mutex mutex_;
  std::list<Buffer> buffers_;  // in the order in which they came
  std::atomic<std::size_t> waiting_{0}, in_use_{0}, most_{0};
};

}  // namespace

RecycledBuffer::RecycledBuffer(std::size_t bytes, int node) : memory_(Waiting::get().take(bytes, node)), bytes_(bytes), node_(node) {}

RecycledBuffer::~RecycledBuffer() {
  if (!memory_.data()) return;
  try {
    Waiting::get().give(std::move(memory_), node_);
  } catch (const std::bad_alloc&) {  // no memory for the list: then it was freed
  }
}

std::size_t RecycledBuffer::waiting_bytes() {
  return Waiting::get().bytes();
}

}  // namespace ktmoe
