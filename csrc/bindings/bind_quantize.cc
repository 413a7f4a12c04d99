// Floats into published formats.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/raw_parts.h"
#include "moe/quantize.h"
#include "moe/repack.h"

namespace ktmoe {
namespace {

void quantize(const std::string& format, const InArray& weights, const std::vector<OutArray>& parts, SubPools* pool,
              const std::string& isa) {
  constexpr const char* kName = "quantize";
  const FormatInfo& info = format_info(format_from_name(format));
  const Isa level = isa_from_name(isa);
  require(info.from_floats, ErrorKind::value, "[quantize] format: got ", info.name, ", expected a published format that is made from floats");
  TensorArg<InArray> w(kName, "weights", weights);
  w.dtype({Dtype::bf16, Dtype::fp32}).shape({-1, -1}).rows_contiguous();
  require(w.extent(0) <= 65536 && w.extent(1) <= 65536, ErrorKind::value, w.where(), ": got [", w.extent(0), ", ", w.extent(1),
          "], expected at most 65536 rows and columns");
  const int n = static_cast<int>(w.extent(0)), k = static_cast<int>(w.extent(1));
  require(parts.size() == static_cast<std::size_t>(info.n_parts()), ErrorKind::value, "[quantize] parts: got ", parts.size(),
          " arrays, expected ", info.n_parts(), " for format ", info.name);
  std::byte* to[kMostRawParts] = {};
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Dtype dtype = raw_part_dtype(info, i);
    TensorArg<OutArray> part(kName, "parts", parts[i]);
    part.dtype({dtype}).shape({n, static_cast<std::int64_t>(raw_row_bytes(info.parts[i], k) / dtype_bytes(dtype))}).contiguous();
    to[i] = part.data<std::byte>();
  }
  const FloatMatrix src{w.data<void>(), w.is(Dtype::bf16), w.stride(0), n, k};
  const WithoutGil nogil;
  quantize_matrix(pool, level, info.format, src, to);
}

}  // namespace

void init_quantize(nb::module_& m) {
  m.def("quantize", &quantize, nb::arg("format"), nb::arg("weights"), nb::arg("parts"), nb::arg("pool").none() = nb::none(),
        nb::arg("isa") = "");
}

}  // namespace ktmoe
