// Scratch: a bump arena that keeps its memory between calls. Not shared between threads.
#pragma once

#include <vector>

#include "base/aligned_buffer.h"

namespace ktmoe {

class Scratch {
 public:
  // Everything handed out so far is free again; fragmented chunks become one.
  void reset() {
    if (chunks_.size() > 1) {
      std::size_t total = 0;
      for (const auto& c : chunks_) total += c.size();
      chunks_.clear();
      chunks_.emplace_back(chunk_bytes(total));
    }
    used_ = 0;
  }

  // 64-byte aligned, uninitialised, valid until reset().
  template <class T>
  T* take(std::size_t count) {
    const std::size_t bytes = round_up_bytes(checked_mul(count, sizeof(T)), 64);
    if (chunks_.empty() || used_ + bytes > chunks_.back().size()) {
      chunks_.emplace_back(chunk_bytes(bytes));
      used_ = 0;
    }
    std::byte* p = chunks_.back().data() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(p);
  }

  std::size_t bytes() const {
    std::size_t total = 0;
    for (const auto& c : chunks_) total += c.size();
    return total;
  }

 private:
  // Whole huge pages, but for those who need little.
  static std::size_t chunk_bytes(std::size_t bytes) {
    constexpr std::size_t kLittle = std::size_t{1} << 16, kHuge = AlignedBuffer::kHugePage;
    if (bytes <= kLittle) return kLittle;
    return bytes < kHuge / 2 ? bytes : round_up_bytes(bytes, kHuge);
  }
  std::vector<AlignedBuffer> chunks_;
  std::size_t used_ = 0;
};

}  // namespace ktmoe
