// Large memory that comes and goes with every training step. The system zeroes each fresh page, which costs more than to fill it, so what
// is freed waits for the next one who needs as much. The system may take back its pages meanwhile (MADV_FREE), and never more is in use
// and waiting together than was once in use.
#pragma once

#include <cstddef>
#include <utility>

#include "base/aligned_buffer.h"

namespace ktmoe {

// Uninitialised, at 64-byte alignment or better.
class RecycledBuffer {
 public:
  RecycledBuffer() = default;
  // node: where its pages lie; memory is used again by the same one alone.
  RecycledBuffer(std::size_t bytes, int node);
  RecycledBuffer(RecycledBuffer&& other) noexcept { swap(other); }
  RecycledBuffer& operator=(RecycledBuffer&& other) noexcept {
    RecycledBuffer old(std::move(*this));
    swap(other);
    return *this;
  }
  ~RecycledBuffer();

  std::size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return memory_.as<T>();
  }

  static std::size_t waiting_bytes();

 private:
  void swap(RecycledBuffer& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    std::swap(node_, other.node_);
  }
  AlignedBuffer memory_;  // at least bytes_
  std::size_t bytes_ = 0;
  int node_ = 0;
};

}  // namespace ktmoe
