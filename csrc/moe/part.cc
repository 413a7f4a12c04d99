// The weights of a part; its passes are in forward.cc and backward.cc.
#include "moe/part.h"

#include <algorithm>

#include "runtime/numa_memory.h"

namespace ktmoe {
namespace {

MoeConfig with_inter(MoeConfig config, int inter) {
  config.inter = inter;
  return config;
}

}  // namespace

LayerPart::LayerPart(const MoeConfig& layer, Slice slice, int node)
    : slice_(slice),
      node_(node),
      config_(with_inter(layer, slice.inter)),
      kernels_(kernels_for(config_.isa)),
      layout_(config_),
      slot_(static_cast<std::size_t>(config_.n_experts), -1) {
  int next = 0;
  for (int e = 0; e < config_.n_experts; ++e)
    if (!config_.gpu(e)) slot_[static_cast<std::size_t>(e)] = next++;
  forget();
}

std::size_t LayerPart::slots() const {
  return static_cast<std::size_t>(*std::max_element(slot_.begin(), slot_.end()) + 1);
}

void LayerPart::forget() {
  data_ = AlignedBuffer();
  biases_ = AlignedBuffer();
  at_.assign(static_cast<std::size_t>(config_.n_experts), nullptr);
  missing_ = static_cast<int>(slots());
}

std::size_t LayerPart::bytes() const {
  const std::size_t each = layout_.bytes + (biases_.data() ? sizeof(float) * bias_floats() : 0);
  return each * (at_.size() - static_cast<std::size_t>(std::count(at_.begin(), at_.end(), nullptr)));
}

std::byte* LayerPart::memory(int e) {
  if (!data_.data()) {
    data_ = AlignedBuffer(checked_mul(layout_.bytes, slots()));
    prefer_node(data_.data(), data_.size(), node_);  // advice: where it is refused, Python has said so
  }
  return data_.data() + layout_.bytes * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]);
}

void LayerPart::place(int e, const std::byte* at) {
  const std::byte*& here = at_[static_cast<std::size_t>(e)];
  missing_ += (here != nullptr) - (at != nullptr);
  here = at;
}

Expert LayerPart::expert(int e) const {
  const std::byte* at = packed(e);
  const float* bias =
      biases_.data() ? biases_.as<float>() + bias_floats() * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]) : nullptr;
  return {PackedMatrix(layout_.gate_up, at), PackedMatrix(layout_.down, at + layout_.gate_up.bytes), bias,
          bias && slice_.leads() ? bias + layout_.gate_up.n_panels * kPanelColumns : nullptr};
}

std::size_t LayerPart::bias_floats() const {
  const int down_panels = slice_.leads() ? layout_.down.n_panels : 0;
  return static_cast<std::size_t>(layout_.gate_up.n_panels + down_panels) * kPanelColumns;
}

void LayerPart::store_biases(int e, const Biases& biases) {
  if (!biases.any()) {
    biases_ = AlignedBuffer();
    return;
  }
  if (!biases_.data()) biases_ = AlignedBuffer(checked_mul(checked_mul(bias_floats(), sizeof(float)), slots()));
  float* bias = biases_.as<float>() + bias_floats() * static_cast<std::size_t>(slot_[static_cast<std::size_t>(e)]);
  std::fill_n(bias, bias_floats(), 0.0f);
  const int h = layout_.h_per_panel;  // columns of a panel that belong to up
  for (int i = 0; i < slice_.inter; ++i) {
    float* panel = bias + i / h * kPanelColumns;
    if (biases.gate) panel[i % h] = biases.gate[slice_.first + i];
    if (biases.up) panel[kPanelColumns - h + i % h] = biases.up[slice_.first + i];
  }
  if (biases.down && slice_.leads()) std::copy_n(biases.down, config_.hidden, bias + layout_.gate_up.n_panels * kPanelColumns);
}

void LayerPart::dequantize(int e, float* gate, float* up, float* down) const {
  const Expert x = expert(e);
  const std::ptrdiff_t hidden = config_.hidden;
  const int h = layout_.h_per_panel;
  for (int i = 0; i < slice_.inter; ++i)
    for (int j = 0; j < hidden; ++j) {
      const std::ptrdiff_t of_layer = slice_.first + i;
      if (gate) gate[of_layer * hidden + j] = x.gate_up.weight(i / h, i % h, j);
      up[of_layer * hidden + j] = x.gate_up.weight(i / h, kPanelColumns - h + i % h, j);
      down[j * std::ptrdiff_t{slice_.whole} + of_layer] = x.down.weight(j / kPanelColumns, j % kPanelColumns, i);
    }
}

}  // namespace ktmoe
