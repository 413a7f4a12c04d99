// The registry of weight formats: what the rest of the engine may know about one.
#pragma once

#include <string_view>
#include <vector>

#include "format/bf16.h"
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
  int k_step;    // weights of one output column in one 1 KB tile
  int per_word;  // consecutive k in one 32-bit word of a tile
  bool has_scales;
  float (*dequantize)(const std::byte* word, int i, float scale);
};

const FormatInfo& format_info(WeightFormat format);
std::vector<WeightFormat> all_formats();
WeightFormat format_from_name(std::string_view name);  // ValueError if unknown

}  // namespace ktmoe
