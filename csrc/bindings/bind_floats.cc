// Floats into published formats, and back.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/raw_parts.h"
#include "moe/floats.h"

namespace ktmoe {
namespace {

// [n, k] of bf16 or fp32.
template <class Data, class Array>
FloatMatrix<Data> float_matrix(const TensorArg<Array>& w) {
  require(w.extent(0) <= 65536 && w.extent(1) <= 65536, ErrorKind::value, w.where(), ": got [", w.extent(0), ", ", w.extent(1),
          "], expected at most 65536 rows and columns");
  return {w.template data<void>(), w.is(Dtype::bf16), w.stride(0), static_cast<int>(w.extent(0)), static_cast<int>(w.extent(1))};
}

void quantize(const std::string& format, const InArray& weights, const std::vector<OutArray>& parts, SubPools* pool,
              const std::string& isa) {
  const FormatInfo& info = format_info(format_from_name(format));
  const Isa level = isa_from_name(isa);
  require(info.from_floats, ErrorKind::value, "[quantize] format: got ", info.name,
          ", expected a published format that is made from floats");
  TensorArg<InArray> w("quantize", "weights", weights);
  w.dtype({Dtype::bf16, Dtype::fp32}).shape({-1, -1}).rows_contiguous();
  const FloatMatrix<const void> src = float_matrix<const void>(w);
  const auto to = raw_parts<std::byte>("quantize", "parts", parts, info, src.n, src.k);
  const WithoutGil nogil;
  quantize_matrix(pool, level, info.format, src, to.data());
}

void dequantize(const std::string& format, const std::vector<InArray>& parts, const OutArray& weights, SubPools* pool,
                const std::string& isa) {
  const FormatInfo& info = format_info(format_from_name(format));
  const Isa level = isa_from_name(isa);
  require(info.published(), ErrorKind::value, "[dequantize] format: got ", info.name, ", expected a published format");
  TensorArg<OutArray> w("dequantize", "weights", weights);
  w.dtype({Dtype::bf16, Dtype::fp32}).shape({-1, -1}).contiguous();
  const FloatMatrix<void> dst = float_matrix<void>(w);
  const auto from = raw_parts<const std::byte>("dequantize", "parts", parts, info, dst.n, dst.k);
  const WithoutGil nogil;
  dequantize_matrix(pool, level, info.format, {{from[0], from[1], from[2]}}, dst);
}

}  // namespace

void init_floats(nb::module_& m) {
  m.def("quantize", &quantize, nb::arg("format"), nb::arg("weights"), nb::arg("parts"), nb::arg("pool").none() = nb::none(),
        nb::arg("isa") = "");
  m.def("dequantize", &dequantize, nb::arg("format"), nb::arg("parts"), nb::arg("weights"), nb::arg("pool").none() = nb::none(),
        nb::arg("isa") = "");
}

}  // namespace ktmoe
