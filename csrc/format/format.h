// The registry of weight formats: what the rest of the engine may know about one.
#pragma once

#include <string_view>
#include <vector>

#include "format/bf16.h"
#include "format/fp8.h"
#include "format/gguf_32.h"
#include "format/gguf_k.h"
#include "format/int4.h"
#include "format/int4_group.h"
#include "format/int4_zero.h"
#include "format/int8.h"

namespace ktmoe {

enum class WeightFormat {
#define KTMOE_FORMAT(id, traits) id,
#include "format/formats.inc"
#undef KTMOE_FORMAT
};

struct FormatInfo {
  WeightFormat format;
  const char* name;
  WeightFormat direct;  // bf16 or int8: the tiles that the GEMMs multiply with, stored as such or made from the stored tiles in cache
  int k_step;           // weights of one output column in one stored tile
  int tile_bytes;       // a stored tile: 16 columns x k_step
  bool has_scales;      // one fp32 scale per output column, behind the panels
  float (*dequantize)(const std::byte* tile, int column, int k, float scale);

  // Published formats only (else null / 0): what a matrix row consists of, and how one block of it gets into a tile.
  RawPart parts[kMostRawParts];
  int block;  // consecutive k that repack takes at once
  // Block b of `column`, of which `columns` <= block weights exist. False: it holds a number that is not finite.
  bool (*repack)(const RawBlock& src, int column, int b, int columns, std::byte* tile);

  bool from_floats;  // KernelTable::quantize_blocks makes it
  // `columns` <= block weights of a block; w has room for all of it. Numbers that are not finite come out as such.
  void (*decode)(const RawBlock& src, int columns, float* w);

  bool published() const { return repack != nullptr; }
  int n_parts() const {
    int n = 0;
    while (n < kMostRawParts && parts[n].block) ++n;
    return n;
  }
};

const FormatInfo& format_info(WeightFormat format);
std::vector<WeightFormat> all_formats();
WeightFormat format_from_name(std::string_view name);  // ValueError if unknown

// k-steps of direct tiles in one stored tile.
inline int direct_steps(const FormatInfo& info) {
  return info.k_step / format_info(info.direct).k_step;
}

}  // namespace ktmoe
