#include "serve/split.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace ktmoe {

void SplitRouting::assign(const MoeConfig& config, const Routing& routing, int protected_k) {
  const std::size_t k = static_cast<std::size_t>(config.top_k), n = static_cast<std::size_t>(routing.n_tokens);
  auto absent = [&](std::int64_t id) { return id < 0 || id >= config.n_experts; };
  auto score = [&](std::size_t i) {
    const float w = routing.weight(i);
    return std::isnan(w) ? std::numeric_limits<float>::infinity() : w;  // a NaN must not break the order
  };
  std::vector<std::uint8_t> is_protected(static_cast<std::size_t>(config.n_experts), 0);
  std::vector<std::size_t> order(k);
  for (std::size_t t = 0; t < n; ++t) {
    std::iota(order.begin(), order.end(), t * k);
    const auto end = std::remove_if(order.begin(), order.end(), [&](std::size_t i) { return absent(routing.id(i)); });
    std::stable_sort(order.begin(), end, [&](std::size_t a, std::size_t b) { return score(a) > score(b); });
    const auto best = std::min<std::ptrdiff_t>(protected_k, end - order.begin());
    for (auto i = order.begin(); i < order.begin() + best; ++i) is_protected[static_cast<std::size_t>(routing.id(*i))] = 1;
  }
  now.assign(n * k, -1);
  later.assign(n * k, -1);
  for (std::size_t i = 0; i < n * k; ++i) {
    const std::int64_t id = routing.id(i);
    if (!absent(id)) (is_protected[static_cast<std::size_t>(id)] ? now : later)[i] = static_cast<std::int32_t>(id);
  }
}

}  // namespace ktmoe
