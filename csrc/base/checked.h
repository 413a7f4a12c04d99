// Size arithmetic that cannot overflow silently.
#pragma once

#include <cstddef>

#include "base/error.h"

namespace ktmoe {

inline std::size_t checked_mul(std::size_t a, std::size_t b) {
  std::size_t r;
  if (__builtin_mul_overflow(a, b, &r)) fail(ErrorKind::memory, "[size] ", a, " * ", b, " overflows");
  return r;
}

inline std::size_t checked_add(std::size_t a, std::size_t b) {
  std::size_t r;
  if (__builtin_add_overflow(a, b, &r)) fail(ErrorKind::memory, "[size] ", a, " + ", b, " overflows");
  return r;
}

constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
constexpr int round_up(int a, int b) {
  return ceil_div(a, b) * b;
}
inline std::size_t round_up_bytes(std::size_t a, std::size_t b) {
  return checked_add(a, b - 1) / b * b;
}

}  // namespace ktmoe
