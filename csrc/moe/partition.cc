#include "moe/partition.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace ktmoe {

std::vector<Slice> partition(const MoeConfig& config, int parts) {
  const int granule = std::lcm(config.activation.h_per_panel(), format_info(config.down_format).k_step);
  const int granules = ceil_div(config.inter, granule), count = std::min(parts, granules);
  std::vector<Slice> slices;
  for (int p = 0, first = 0; p < count; ++p) {
    const int own = granule * (granules / count + (p < granules % count));
    slices.push_back({first, std::min(own, config.inter - first), config.inter});
    first += own;
  }
  return slices;
}

ExpertLayout::ExpertLayout(const MoeConfig& config)
    : gate_up(config.activation.gated() ? PackedLayout::paired(config.format, config.inter, config.hidden)
                                        : PackedLayout::plain(config.format, config.inter, config.hidden)),
      down(PackedLayout::plain(config.down_format, config.hidden, config.inter)),
      h_per_panel(config.activation.h_per_panel()),
      bytes(round_up_bytes(checked_add(gate_up.bytes, down.bytes), 4096)) {}

namespace {

std::size_t scales_at(const PackedLayout& l) {
  return l.panel_stride * static_cast<std::size_t>(l.n_panels);
}

// f(offset in the whole expert, offset in the part, bytes) for every run of bytes that belongs to the slice.
template <class F>
void each_run(const ExpertLayout& whole, const ExpertLayout& part, Slice slice, F f) {
  constexpr std::size_t kPanelScales = kPanelColumns * sizeof(float);
  const FormatInfo &gate_up = format_info(part.gate_up.format), &down = format_info(part.down.format);
  const std::size_t panel = static_cast<std::size_t>(slice.first / whole.h_per_panel);
  f(whole.gate_up.panel_stride * panel, 0, scales_at(part.gate_up));
  if (gate_up.has_scales)
    f(scales_at(whole.gate_up) + kPanelScales * panel, scales_at(part.gate_up),
      kPanelScales * static_cast<std::size_t>(part.gate_up.n_panels));

  const std::size_t whole_down = whole.gate_up.bytes, part_down = part.gate_up.bytes;
  const std::size_t step = static_cast<std::size_t>(slice.first / down.k_step), step_bytes = 2 * static_cast<std::size_t>(down.tile_bytes);
  for (std::size_t p = 0; p < static_cast<std::size_t>(part.down.n_panels); ++p)
    f(whole_down + whole.down.panel_stride * p + step_bytes * step, part_down + part.down.panel_stride * p,
      step_bytes * static_cast<std::size_t>(part.down.k_steps));
  if (down.has_scales)
    f(whole_down + scales_at(whole.down), part_down + scales_at(part.down), kPanelScales * static_cast<std::size_t>(part.down.n_panels));
}

}  // namespace

void copy_slice(const ExpertLayout& whole, const std::byte* from, const ExpertLayout& part, Slice slice, std::byte* to) {
  each_run(whole, part, slice, [&](std::size_t w, std::size_t p, std::size_t bytes) { std::memcpy(to + p, from + w, bytes); });
}

void paste_slice(const ExpertLayout& part, Slice slice, const std::byte* from, const ExpertLayout& whole, std::byte* to) {
  each_run(whole, part, slice, [&](std::size_t w, std::size_t p, std::size_t bytes) { std::memcpy(to + w, from + p, bytes); });
}

}  // namespace ktmoe
