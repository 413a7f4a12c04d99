// Owning, zeroed memory at 64-byte alignment or better. Large buffers are page mappings: pages that are never written cost nothing. They
// begin at the border of a huge page and the kernel is asked for huge pages: weights are streamed, and operands of a kernel that take half
// of the L2 must not collide in it, which small pages at random addresses do.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/checked.h"

namespace ktmoe {

// For tests: the n-th allocation from now fails; 0: none.
inline std::atomic<int> failing_allocation{0};

class AlignedBuffer {
 public:
  static constexpr std::size_t kHugePage = std::size_t{1} << 21, kSmallPage = 4096;
  static constexpr std::size_t kMapFrom = std::size_t{1} << 20;  // bytes; smaller ones come from the heap

  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    if (failing_allocation.load(std::memory_order_relaxed) > 0 && failing_allocation.fetch_sub(1) == 1)
      fail(ErrorKind::memory, "[allocate] ", bytes, " bytes refused for a test");
    if (bytes >= kMapFrom) {
      void* p = mmap(nullptr, checked_add(mapped(), kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) fail(ErrorKind::memory, "[allocate] ", bytes, " bytes refused by the system");
      auto* begin = static_cast<std::byte*>(p);
      const std::size_t before = kHugePage - reinterpret_cast<std::size_t>(p) % kHugePage;
      munmap(begin, before);
      if (before < kHugePage) munmap(begin + before + mapped(), kHugePage - before);
      data_ = begin + before;
      madvise(data_, mapped(), MADV_HUGEPAGE);  // advice only: a kernel without huge pages is fine
    } else {
      data_ = static_cast<std::byte*>(std::aligned_alloc(64, round_up_bytes(bytes, 64)));
      if (!data_) fail(ErrorKind::memory, "[allocate] ", bytes, " bytes refused by the system");
      std::memset(data_, 0, bytes);
    }
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    AlignedBuffer old(std::move(*this));
    swap(other);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() {
    if (!data_) return;
    if (bytes_ >= kMapFrom)
      munmap(data_, mapped());
    else
      std::free(data_);
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::size_t mapped() const { return round_up_bytes(bytes_, kSmallPage); }
  void swap(AlignedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace ktmoe
