// The format registry, generated from formats.inc.
#include "format/format.h"

#include <algorithm>

#include "base/error.h"

namespace ktmoe {
namespace {

template <class T>
constexpr FormatInfo info_of(WeightFormat format) {
  FormatInfo info{};
  info.format = format;
  info.name = T::name;
  info.direct = T::int8_products ? WeightFormat::int8 : WeightFormat::bf16;
  info.k_step = T::k_step;
  info.tile_bytes = T::rows * kRowBytes;
  info.has_scales = T::has_scales;
  info.dequantize = &T::dequantize;
  return info;
}

template <class T>
constexpr FormatInfo published_info_of(WeightFormat format) {
  FormatInfo info = info_of<T>(format);
  std::copy(std::begin(T::parts), std::end(T::parts), info.parts);
  info.block = T::block;
  info.repack = &T::repack;
  info.from_floats = T::from_floats;
  info.decode = &T::decode;
  return info;
}

}  // namespace

const FormatInfo& format_info(WeightFormat format) {
  static constexpr FormatInfo table[] = {
#define KTMOE_FORMAT(id, traits) info_of<traits>(WeightFormat::id),
#define KTMOE_BLOCK_FORMAT(id, traits) published_info_of<traits>(WeightFormat::id),
#include "format/formats.inc"
#undef KTMOE_FORMAT
  };
  return table[static_cast<int>(format)];
}

std::vector<WeightFormat> all_formats() {
  return {
#define KTMOE_FORMAT(id, traits) WeightFormat::id,
#include "format/formats.inc"
#undef KTMOE_FORMAT
  };
}

WeightFormat format_from_name(std::string_view name) {
  std::string known;
  for (WeightFormat f : all_formats()) {
    if (format_info(f).name == name) return f;
    known += (known.empty() ? "" : ", ") + std::string(format_info(f).name);
  }
  fail(ErrorKind::value, "[format] unknown weight format: got '", name, "', expected one of ", known);
}

}  // namespace ktmoe
