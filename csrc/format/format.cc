// The format registry, generated from formats.inc.
#include "format/format.h"

#include "base/error.h"

namespace ktmoe {
namespace {
template <class Traits>
constexpr FormatInfo info_of(WeightFormat format) {
  return {format, Traits::name, Traits::k_step, Traits::per_word, Traits::has_scales, &Traits::dequantize};
}
}  // namespace

const FormatInfo& format_info(WeightFormat format) {
  static constexpr FormatInfo table[] = {
#define KTMOE_FORMAT(id, traits) info_of<traits>(WeightFormat::id),
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
