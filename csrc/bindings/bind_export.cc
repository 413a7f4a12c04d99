// Packed experts back into plain arrays.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/raw_parts.h"
#include "moe/published.h"

namespace ktmoe {
namespace {

using Parts = std::vector<OutArray>;

// The parts of one matrix [n, k], checked, and filled from `w`.
void unpack_matrix(const char* name, const PackedMatrix& w, TileOfRow place, int n, const Parts& arrays) {
  const FormatInfo& info = format_info(w.layout().format);
  const int k = w.layout().k;
  const bool is_bf16 = info.format == WeightFormat::bf16;
  if (info.published()) {
    const auto parts = raw_parts<std::byte>("unpack_expert", name, arrays, info, n, k);
    const WithoutGil nogil;
    return unpack_published(w, place, 0, n, parts.data());
  }
  const std::size_t expected = is_bf16 ? 1 : 2;
  require(arrays.size() == expected, ErrorKind::value, "[unpack_expert] ", name, ": got ", arrays.size(), " arrays, expected ", expected,
          " for format ", info.name);
  auto arg = [&](std::size_t i) { return TensorArg<OutArray>("unpack_expert", name, arrays[i]); };
  if (is_bf16) {
    bf16* numbers = arg(0).dtype({Dtype::bf16}).shape({n, k}).contiguous().data<bf16>();
    const WithoutGil nogil;
    return unpack_bf16(w, place, 0, n, numbers);
  }
  auto* codes = arg(0).dtype({Dtype::int8}).shape({n, k}).contiguous().data<std::int8_t>();
  float* scales = arg(1).dtype({Dtype::fp32}).shape({n}).contiguous().data<float>();
  const WithoutGil nogil;
  unpack_int8(w, place, 0, n, codes, scales);
}

void unpack_expert(const InArray& packed, int hidden, int inter, const std::string& gate_up_format, const std::string& down_format,
                   const std::optional<Parts>& gate, const Parts& up, const Parts& down) {
  require(hidden >= 1 && hidden <= 65536 && inter >= 1 && inter <= 65536, ErrorKind::value, "[unpack_expert] hidden, inter: got ", hidden,
          " and ", inter, ", expected 1 to 65536");
  const WeightFormat format = format_from_name(gate_up_format);
  const PackedLayout first = gate ? PackedLayout::paired(format, inter, hidden) : PackedLayout::plain(format, inter, hidden);
  const PackedLayout second = PackedLayout::plain(format_from_name(down_format), hidden, inter);
  TensorArg<InArray> p("unpack_expert", "packed", packed);
  p.dtype({Dtype::uint8}).contiguous();
  require(p.bytes() >= checked_add(first.bytes, second.bytes), ErrorKind::value, p.where(), ": got ", p.bytes(), " bytes, expected ",
          first.bytes + second.bytes, " or more");
  const PackedMatrix gate_up(first, p.data<std::byte>()), w_down(second, p.data<std::byte>() + first.bytes);
  if (gate) unpack_matrix("gate", gate_up, {true, 0}, inter, *gate);
  unpack_matrix("up", gate_up, {gate.has_value(), 1}, inter, up);
  unpack_matrix("down", w_down, {false, 0}, hidden, down);
}

}  // namespace

void init_export(nb::module_& m) {
  m.def("unpack_expert", &unpack_expert, nb::arg("packed"), nb::arg("hidden"), nb::arg("inter"), nb::arg("gate_up_format"),
        nb::arg("down_format"), nb::arg("gate").none(), nb::arg("up"), nb::arg("down"));
}

}  // namespace ktmoe
