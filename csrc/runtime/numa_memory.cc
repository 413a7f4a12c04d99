#include "runtime/numa_memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

namespace ktmoe {

// The system call itself: libnuma would be one more thing to install.
int prefer_node(void* data, std::size_t bytes, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED: another node when this one is full, so that it never fails for lack of memory
  constexpr int kNodes = 1024, kWordBits = 8 * sizeof(unsigned long);
  if (node < 0) return 0;
  if (node >= kNodes) return EINVAL;
  unsigned long mask[kNodes / kWordBits] = {};
  mask[node / kWordBits] = 1ul << node % kWordBits;
  return syscall(SYS_mbind, data, bytes, kPreferred, mask, kNodes + 1, 0) == 0 ? 0 : errno;
}

int try_prefer_node(int node) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* data = mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return errno;
  const int error = prefer_node(data, page, node);
  munmap(data, page);
  return error;
}

}  // namespace ktmoe
