#include "moe/packing.h"

#include <algorithm>

#include "moe/lora.h"
#include "moe/repack.h"

namespace ktmoe {
namespace {

constexpr int kUnit = 4;  // panels

bool published(const PackedLayout& layout) {
  return format_info(layout.format).published();
}
const bf16* bf16_of(const RawBlock& matrix) {
  return reinterpret_cast<const bf16*>(matrix.part[0]);
}

}  // namespace

ExpertPacker::ExpertPacker(const MoeConfig& config, const ExpertLayout& layout, const RawBlock& gate, const RawBlock& up,
                           const RawBlock& down)
    : config_(config), layout_(layout), kernels_(kernels_for(config.isa)), gate_(gate), up_(up), down_(down) {}

int ExpertPacker::units() const {
  return ceil_div(layout_.gate_up.n_panels, kUnit) + ceil_div(layout_.down.n_panels, kUnit);
}

void ExpertPacker::pack(int unit, std::byte* expert) const {
  const int gate_units = ceil_div(layout_.gate_up.n_panels, kUnit);
  if (unit < gate_units) return gate_up(kUnit * unit, std::min(kUnit * (unit + 1), layout_.gate_up.n_panels), expert);
  const int p0 = kUnit * (unit - gate_units);
  plain("down", down_, config_.hidden, layout_.down, p0, std::min(p0 + kUnit, layout_.down.n_panels), expert + layout_.gate_up.bytes);
}

void ExpertPacker::gate_up(int p0, int p1, std::byte* at) const {
  const PackedLayout& layout = layout_.gate_up;
  const int hidden = config_.hidden, inter = config_.inter;
  if (!gate_.part[0]) return plain("up", up_, inter, layout, p0, p1, at);
  if (!published(layout)) return pack_matrix(kernels_, layout, p0, p1, hidden, PairedRows{bf16_of(gate_), bf16_of(up_), hidden, inter}, at);
  auto rows = [&](int p, int t) {
    return t == 0 ? RawRows{"gate", gate_, p * kTileColumns, inter} : RawRows{"up", up_, p * kTileColumns, inter};
  };
  repack_matrix(layout, p0, p1, rows, at);
}

void ExpertPacker::plain(const char* name, const RawBlock& matrix, int rows, const PackedLayout& layout, int p0, int p1,
                         std::byte* at) const {
  if (!published(layout)) return pack_matrix(kernels_, layout, p0, p1, layout.k, PlainRows{bf16_of(matrix), layout.k, rows}, at);
  repack_matrix(layout, p0, p1, [&](int p, int t) { return RawRows{name, matrix, p * kPanelColumns + t * kTileColumns, rows}; }, at);
}

}  // namespace ktmoe
