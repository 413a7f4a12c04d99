// How a layer is cut into parts along inter, and which packed bytes belong to a part.
//
// Part p owns columns [first, first + inter) of h: those rows of gate and up, those columns of down. Cuts lie where both packed layouts
// can be cut: at multiples of a panel of gate/up and of a stored k-step of down. So the slices of a packed expert are byte copies:
//   gate/up  consecutive panels, and their scales
//   down     consecutive k-steps of each panel, and all scales
#pragma once

#include <vector>

#include "format/packed_matrix.h"
#include "moe/config.h"

namespace ktmoe {

struct Slice {
  int first, inter;  // of h
  int whole;         // inter of the layer

  bool leads() const { return first == 0; }  // the part that gives what exists once, such as the bias of down
};

// At most `parts` slices that cover [0, inter) in order, none empty. Granules are shared out evenly, earlier parts get the larger share;
// the last slice may end within a granule.
std::vector<Slice> partition(const MoeConfig& config, int parts);

// Where the matrices of an expert lie in its packed bytes: gate/up, then down.
struct ExpertLayout {
  PackedLayout gate_up, down;
  int h_per_panel;    // columns of h that one panel of gate/up gives
  std::size_t bytes;  // a multiple of 4096

  explicit ExpertLayout(const MoeConfig& config);
};

// From the packed bytes of a whole expert to those of a slice, and back.
void copy_slice(const ExpertLayout& whole, const std::byte* from, const ExpertLayout& part, Slice slice, std::byte* to);
void paste_slice(const ExpertLayout& part, Slice slice, const std::byte* from, const ExpertLayout& whole, std::byte* to);

}  // namespace ktmoe
