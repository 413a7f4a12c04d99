// Owning, zeroed memory at 64-byte alignment or better. Large buffers are page mappings: pages that are never written cost nothing,
// and the kernel is asked for huge pages because the weights are streamed.
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
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    if (failing_allocation.load(std::memory_order_relaxed) > 0 && failing_allocation.fetch_sub(1) == 1)
      fail(ErrorKind::memory, "[allocate] ", bytes, " bytes refused for a test");
    if (bytes >= kMapFrom) {
      void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) fail(ErrorKind::memory, "[allocate] ", bytes, " bytes refused by the system");
      madvise(p, bytes, MADV_HUGEPAGE);  // advice only: a kernel without huge pages is fine
      data_ = static_cast<std::byte*>(p);
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
      munmap(data_, bytes_);
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
  static constexpr std::size_t kMapFrom = std::size_t{1} << 20;
  void swap(AlignedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace ktmoe
