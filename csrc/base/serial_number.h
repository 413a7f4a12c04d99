// Numbers that are given out once in the life of the process: identities that, unlike addresses, never come back.
#pragma once

#include <atomic>
#include <cstdint>

namespace ktmoe {

inline std::uint64_t next_serial_number() {
  static std::atomic<std::uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace ktmoe
