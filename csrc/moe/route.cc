#include "moe/route.h"

#include <algorithm>

namespace ktmoe {
namespace {

constexpr int kRowsOfATile = 16;  // AMX; other levels take any number as well

}  // namespace

Routing Routing::slice(int first, int count, int top_k) const {
  const std::ptrdiff_t skip = static_cast<std::ptrdiff_t>(first) * top_k;
  return {count, ids32 ? ids32 + skip : nullptr, ids64 ? ids64 + skip : nullptr, weights32 ? weights32 + skip : nullptr,
          weights16 ? weights16 + skip : nullptr};
}

void Routing::check(const MoeConfig& config) const {
  const std::size_t k = static_cast<std::size_t>(config.top_k), n = static_cast<std::size_t>(n_tokens) * k;
  for (std::size_t i = 0; i < n; ++i)
    require(id(i) >= -1 && id(i) <= config.n_experts, ErrorKind::value, "[forward] expert id at token ", i / k, ", slot ", i % k, ": got ",
            id(i), ", expected 0 to ", config.n_experts - 1, ", or -1 or ", config.n_experts, " for 'not routed here'");
}

RoutePlan::RoutePlan(const MoeConfig& config, const Routing& routing, int block_rows, const std::uint8_t* on_gpu)
    : n_tokens(routing.n_tokens), top_k(config.top_k) {
  const std::size_t slots = static_cast<std::size_t>(n_tokens) * static_cast<std::size_t>(top_k);
  std::vector<int> expert(slots), next(static_cast<std::size_t>(config.n_experts) + 1, 0);
  slot_weight.resize(slots);
  for (std::size_t i = 0; i < slots; ++i) {
    const std::int64_t id = routing.id(i);
    const bool here = id >= 0 && id < config.n_experts && !(on_gpu && on_gpu[id]);
    expert[i] = here ? static_cast<int>(id) : -1;
    slot_weight[i] = routing.weight(i);
    if (here) ++next[static_cast<std::size_t>(id) + 1];
  }
  for (std::size_t e = 0; e < static_cast<std::size_t>(config.n_experts); ++e) {
    const int begin = next[e], rows = next[e + 1];
    next[e + 1] += begin;
    if (rows == 0) continue;
    expert_blocks.push_back(static_cast<int>(blocks.size()));
    const int even = round_up(ceil_div(rows, ceil_div(rows, block_rows)), kRowsOfATile);
    for (int r = 0; r < rows; r += even) blocks.push_back({static_cast<int>(e), begin + r, std::min(even, rows - r)});
  }
  expert_blocks.push_back(static_cast<int>(blocks.size()));

  const std::size_t rows = static_cast<std::size_t>(next.back());
  token.resize(rows);
  weight.resize(rows);
  row_of.assign(slots, -1);
  for (std::size_t i = 0; i < slots; ++i) {
    if (expert[i] < 0) continue;
    const int row = next[static_cast<std::size_t>(expert[i])]++;
    row_of[i] = row;
    token[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(i / static_cast<std::size_t>(top_k));
    weight[static_cast<std::size_t>(row)] = slot_weight[i];
  }
}

int RoutePlan::most_rows() const {
  int most = 0;
  for (const Block& b : blocks) most = std::max(most, b.rows);
  return most;
}

}  // namespace ktmoe
