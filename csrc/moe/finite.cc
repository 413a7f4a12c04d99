#include "moe/finite.h"

#include <cmath>

namespace ktmoe {
namespace {

constexpr std::uint16_t kExponent = 0x7f80;  // all ones: NaN or an infinity

// Without a branch in the loop, so that it runs at the speed of memory.
bool all_finite(const bf16* x, int n) {
  std::uint16_t bad = 0;
  for (int i = 0; i < n; ++i) bad |= static_cast<std::uint16_t>((x[i].bits & kExponent) == kExponent);
  return bad == 0;
}

[[noreturn]] void refuse(const char* function, const char* argument, int token, const char* what, int at, float got) {
  fail(ErrorKind::value, "[", function, "] ", argument, ": got ", got, " at token ", token, ", ", what, " ", at,
       ", expected finite numbers (check_finite=True)");
}

}  // namespace

void check_finite(const char* function, const char* argument, Tokens rows, int n, int columns) {
  for (int t = 0; t < n; ++t) {
    const bf16* row = rows.data + t * rows.ld;
    if (all_finite(row, columns)) continue;
    int first = 0;
    while (std::isfinite(to_float(row[first]))) ++first;
    refuse(function, argument, t, "element", first, to_float(row[first]));
  }
}

void check_finite(const char* function, const Routing& routing, const MoeConfig& config) {
  const int k = config.top_k;
  for (int t = 0; t < routing.n_tokens; ++t)
    for (int slot = 0; slot < k; ++slot) {
      const std::size_t i = static_cast<std::size_t>(t) * static_cast<std::size_t>(k) + static_cast<std::size_t>(slot);
      const bool routed = routing.id(i) >= 0 && routing.id(i) < config.n_experts;
      if (routed && !std::isfinite(routing.weight(i))) refuse(function, "weights", t, "slot", slot, routing.weight(i));
    }
}

}  // namespace ktmoe
