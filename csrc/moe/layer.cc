// Loading, and the bookkeeping of a layer; the passes over its parts are in passes.cc.
#include "moe/layer.h"

#include <algorithm>

#include "moe/packing.h"

namespace ktmoe {

MoeLayer::MoeLayer(std::shared_ptr<SubPools> pools, MoeConfig config)
    : pools_(std::move(pools)), config_((config.validate(), std::move(config))), layout_(config_) {
  const std::vector<Slice> slices = partition(config_, pools_->count());
  for (int p = 0; p < static_cast<int>(slices.size()); ++p)
    parts_.emplace_back(config_, slices[static_cast<std::size_t>(p)], pools_->node(p));
}

bool MoeLayer::loaded() const {
  return std::all_of(parts_.begin(), parts_.end(), [](const LayerPart& p) { return p.missing() == 0; });
}

void MoeLayer::unload() {
  SubPools::Session session(*pools_, parts());  // not under a running forward
  for (LayerPart& p : parts_) p.forget();
}

std::size_t MoeLayer::packed_bytes() const {
  std::size_t total = 0;
  for (const LayerPart& p : parts_) total += p.bytes();
  return total;
}

void MoeLayer::check_expert(const char* function, int e) const {
  require(e >= 0 && e < config_.n_experts && parts_.back().has(e), ErrorKind::value, "[", function, "] expert: got ", e,
          ", expected one that is loaded");
}

void MoeLayer::check_biases(int e, const Biases& biases) const {
  require(config_.activation.gated() || !biases.gate, ErrorKind::value,
          "[load_expert] gate_bias: got an array, expected none: the activation has no gate");
  bool others = false;
  for (int i = 0; i < config_.n_experts; ++i) others |= i != e && part(0).has(i);
  require(!others || biases.any() == part(0).has_biases(), ErrorKind::value, "[load_expert] biases of expert ", e, ": got ",
          biases.any() ? "some" : "none", ", expected ", biases.any() ? "none" : "some", " as for the experts loaded before");
}

// --- packed bytes ---

void MoeLayer::read_expert(int e, std::byte* out) const {
  SubPools::Session session(*pools_, parts(), Wake::nobody);  // not while it is unloaded
  check_expert("read_expert", e);
  if (parts() == 1) {
    std::memcpy(out, part(0).packed(e), layout_.bytes);
    return;
  }
  std::memset(out, 0, layout_.bytes);  // padding
  for (const LayerPart& p : parts_) paste_slice(p.layout(), p.slice(), p.packed(e), layout_, out);
}

void MoeLayer::attach(const std::byte* packed, int n_rows, const std::vector<int>& row, const Biases& biases) {
  require(reinterpret_cast<std::uintptr_t>(packed) % 64 == 0, ErrorKind::value, "[attach] packed: got memory that is not 64-byte aligned");
  require(row.size() == static_cast<std::size_t>(config_.n_experts), ErrorKind::value, "[attach] row: got ", row.size(),
          " entries, expected ", config_.n_experts);
  for (int e = 0; e < config_.n_experts; ++e) {
    const int r = row[static_cast<std::size_t>(e)];
    require(config_.gpu(e) || (r >= 0 && r < n_rows), ErrorKind::value, "[attach] row[", e, "]: got ", r, ", expected 0 to ", n_rows - 1);
  }
  SubPools::Session session(*pools_, parts());
  for (LayerPart& p : parts_) p.forget();
  const bool copy = parts() > 1;
  for (LayerPart& p : parts_)  // all memory that it takes
    for (int e = 0; e < config_.n_experts; ++e) {
      if (config_.gpu(e)) continue;
      auto of = [&](const float* all, int n) { return all ? all + std::ptrdiff_t{row[static_cast<std::size_t>(e)]} * n : nullptr; };
      p.store_biases(e, {of(biases.gate, config_.inter), of(biases.up, config_.inter), of(biases.down, config_.hidden)});
      if (copy) p.memory(e);
    }
  auto packed_of = [&](int e) { return packed + layout_.bytes * static_cast<std::size_t>(row[static_cast<std::size_t>(e)]); };
  session.each([&](int p) {
    LayerPart& own = part(p);
    session.part(p).parallel_for(config_.n_experts, [&](int e, int) {
      if (copy && !config_.gpu(e)) copy_slice(layout_, packed_of(e), own.layout(), own.slice(), own.memory(e));
    });
    for (int e = 0; e < config_.n_experts; ++e)
      if (!config_.gpu(e)) own.place(e, copy ? own.memory(e) : packed_of(e));
  });
}

// --- loading ---

void MoeLayer::load(const char* function, int e, const ExpertPacker& packer, const Biases& biases) {
  require(e >= 0 && e < config_.n_experts, ErrorKind::value, "[", function, "] expert: got ", e, ", expected 0 to ", config_.n_experts - 1);
  require(!config_.gpu(e), ErrorKind::value, "[", function, "] expert ", e, " is on the GPU and has no memory here");
  SubPools::Session session(*pools_, parts());
  check_biases(e, biases);
  AlignedBuffer whole;
  if (parts() > 1) whole = AlignedBuffer(layout_.bytes);
  for (LayerPart& p : parts_) p.memory(e);
  for (LayerPart& p : parts_) p.store_biases(e, biases);  // the last thing that may run out of memory
  for (LayerPart& p : parts_) p.place(e, nullptr);        // until all of it is there
  std::byte* at = parts() > 1 ? whole.data() : part(0).memory(e);
  session.parallel_for(packer.units(), [&](int unit, Scratch&) { packer.pack(unit, at); });
  if (parts() > 1) session.each([&](int p) { copy_slice(layout_, at, part(p).layout(), part(p).slice(), part(p).memory(e)); });
  for (LayerPart& p : parts_) p.place(e, p.memory(e));
}

void MoeLayer::load_expert(int e, const bf16* gate, const bf16* up, const bf16* down, const Biases& biases) {
  for (const WeightFormat f : {config_.format, config_.down_format})
    require(!format_info(f).published(), ErrorKind::value, "[load_expert] format ", format_info(f).name,
            " takes published bytes: expected load_expert_raw");
  load("load_expert", e, ExpertPacker(config_, layout_, raw_bf16(gate), raw_bf16(up), raw_bf16(down)), biases);
}

void MoeLayer::load_expert_raw(int e, const RawBlock& gate, const RawBlock& up, const RawBlock& down, const Biases& biases) {
  for (const WeightFormat f : {config_.format, config_.down_format})
    require(f == WeightFormat::bf16 || format_info(f).published(), ErrorKind::value, "[load_expert_raw] format ", format_info(f).name,
            " is made from bf16 weights: expected load_expert");
  load("load_expert_raw", e, ExpertPacker(config_, layout_, gate, up, down), biases);
}

void MoeLayer::dequantize(int e, float* gate, float* up, float* down) const {
  check_expert("dequantize_expert", e);
  for (const LayerPart& p : parts_) p.dequantize(e, gate, up, down);
}

}  // namespace ktmoe
