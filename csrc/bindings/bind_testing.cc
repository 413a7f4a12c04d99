// Single kernels on caller-owned memory, for the oracle and guard-page tests: every operand is a byte array placed by the test.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "base/recycled_buffer.h"
#include "bindings/tensor_arg.h"
#include "moe/lora.h"
#include "moe/repack.h"
#include "runtime/sub_pools.h"

namespace ktmoe {
namespace {

struct Kernel {
  const KernelTable& table;
  WeightFormat format;
  Kernel(const std::string& isa, const std::string& format) : table(kernels_for(isa_from_name(isa))), format(format_from_name(format)) {}
};

template <class Array>
auto* bytes(const char* name, const Array& array, std::size_t at_least) {
  TensorArg<Array> a("testing", name, array);
  a.contiguous();
  require(a.bytes() >= at_least, ErrorKind::value, a.where(), ": got ", a.bytes(), " bytes, expected ", at_least);
  return a.template data<std::byte>();
}

RowSource rows_of(const char* name, const InArray& rows, const std::optional<InArray>& index) {
  TensorArg<InArray> r("testing", name, rows);
  r.dtype({Dtype::bf16, Dtype::int8}).shape({-1, -1}).rows_contiguous();
  return {r.data<void>(), r.stride(0), index ? static_cast<const std::int32_t*>(index->data()) : nullptr};
}

PackedMatrix packed(WeightFormat format, const InArray& weights, int n_panels, int k) {
  const PackedLayout layout = PackedLayout::make(format, n_panels, k);
  return {layout, bytes("weights", weights, layout.bytes)};
}

// pack(isa, format, w [n, k] bf16, paired_with or None, dst): plain, or gate (w) paired with up.
void pack(const std::string& isa, const std::string& format, const InArray& w, const std::optional<InArray>& up, const OutArray& dst) {
  const Kernel k(isa, format);
  TensorArg<InArray> a("testing", "w", w);
  a.dtype({Dtype::bf16}).shape({-1, -1}).rows_contiguous();
  const int n = static_cast<int>(a.extent(0)), columns = static_cast<int>(a.extent(1));
  const PackedLayout layout = up ? PackedLayout::paired(k.format, n, columns) : PackedLayout::plain(k.format, n, columns);
  std::byte* out = bytes("dst", dst, layout.bytes);
  if (up)
    pack_matrix(k.table, layout, 0, layout.n_panels, a.stride(0),
                PairedRows{a.data<bf16>(), static_cast<const bf16*>(up->data()), a.stride(0), n}, out);
  else
    pack_matrix(k.table, layout, 0, layout.n_panels, a.stride(0), PlainRows{a.data<bf16>(), a.stride(0), n}, out);
}

// repack(format, parts of a matrix [n, k], n, k, dst): a published matrix, plain.
void repack(const std::string& format, const std::vector<InArray>& parts, int n, int k, const OutArray& dst) {
  const PackedLayout layout = PackedLayout::plain(format_from_name(format), n, k);
  const FormatInfo& info = format_info(layout.format);
  RawBlock raw{};
  for (std::size_t i = 0; i < parts.size() && i < kMostRawParts; ++i)
    raw.part[i] = bytes("parts", parts[i], raw_row_bytes(info.parts[i], k) * static_cast<std::size_t>(n));
  repack_matrix(
      layout, 0, layout.n_panels, [&](int p, int t) { return RawRows{"w", raw, p * kPanelColumns + t * kTileColumns, n}; },
      bytes("dst", dst, layout.bytes));
}

using PlusArg = std::optional<std::tuple<InArray, InArray, int>>;  // operand, weights in bf16, k

void forward_into(const std::string& isa, const std::string& format, const InArray& operand, int m, const InArray& weights, int n_panels,
                  int k, int p0, int p1, const OutArray& c, const PlusArg& plus, const Epilogue* epilogue) {
  const Kernel kernel(isa, format);
  const auto run = [&](const Addend* addend) {
    kernel.table.forward(
        bytes("operand", operand, kernel.table.operand_bytes(kernel.format, m, k)), m, packed(kernel.format, weights, n_panels, k), p0, p1,
        reinterpret_cast<float*>(bytes("c", c, c_block_floats(m) * static_cast<std::size_t>(p1 - p0) * 4)), addend, epilogue);
  };
  if (!plus) return run(nullptr);
  const auto& [rows, w, plus_k] = *plus;
  const PackedMatrix matrix = packed(WeightFormat::bf16, w, n_panels, plus_k);
  const Addend addend{bytes("plus", rows, kernel.table.operand_bytes(WeightFormat::bf16, m, plus_k)), matrix};
  run(&addend);
}

void forward(const std::string& isa, const std::string& format, const InArray& operand, int m, const InArray& weights, int n_panels, int k,
             int p0, int p1, const OutArray& c, const PlusArg& plus) {
  forward_into(isa, format, operand, m, weights, n_panels, k, p0, p1, c, plus, nullptr);
}

// The same through an epilogue that puts what it gets into `sums` [p1 - p0][m][32] and counts in `taken` [p1 - p0][m] how often it got it.
void forward_taken(const std::string& isa, const std::string& format, const InArray& operand, int m, const InArray& weights, int n_panels,
                   int k, int p0, int p1, const OutArray& c, const PlusArg& plus, const OutArray& sums, const OutArray& taken) {
  const std::size_t rows = static_cast<std::size_t>(p1 - p0) * static_cast<std::size_t>(m);
  struct Sums {
    int p0, m;
    float* sum;
    std::int32_t* taken;
  } context{p0, m, reinterpret_cast<float*>(bytes("sums", sums, rows * kPanelColumns * 4)),
            reinterpret_cast<std::int32_t*>(bytes("taken", taken, rows * 4))};
  const Epilogue epilogue{[](void* at, float* block, int row, int count, int panel) {
                            const Sums& to = *static_cast<Sums*>(at);
                            for (int r = 0; r < count; ++r, block += kPanelColumns) {
                              const std::ptrdiff_t i = static_cast<std::ptrdiff_t>(panel - to.p0) * to.m + row + r;
                              ++to.taken[i];
                              for (int j = 0; j < kPanelColumns; ++j) to.sum[i * kPanelColumns + j] = block[j];
                            }
                          },
                          &context};
  forward_into(isa, format, operand, m, weights, n_panels, k, p0, p1, c, plus, &epilogue);
}

void backward(const std::string& isa, const std::string& format, const InArray& operand, int m, const InArray& weights, int n_panels, int k,
              int s0, int s1, const OutArray& c, bool accumulate) {
  const Kernel kernel(isa, format);
  const std::size_t blocks = static_cast<std::size_t>(s1 - s0) * static_cast<std::size_t>(format_info(kernel.format).k_step / 32);
  kernel.table.backward(bytes("operand", operand, kernel.table.grad_operand_bytes(m, n_panels)), m,
                        packed(kernel.format, weights, n_panels, k), s0, s1,
                        reinterpret_cast<float*>(bytes("c", c, c_block_floats(m) * blocks * 4)), accumulate);
}

}  // namespace

void init_testing(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("testing");
  m.def("block_rows", [](const std::string& isa) { return kernels_for(isa_from_name(isa)).block_rows; });
  m.def("k_step", [](const std::string& format) { return format_info(format_from_name(format)).k_step; });
  m.def("packed_bytes",
        [](const std::string& format, int n_panels, int k) { return PackedLayout::make(format_from_name(format), n_panels, k).bytes; });
  m.def("panel_stride", [](const std::string& format, int n_panels, int k) {
    return PackedLayout::make(format_from_name(format), n_panels, k).panel_stride;
  });
  m.def("pack", &pack, nb::arg("isa"), nb::arg("format"), nb::arg("w"), nb::arg("up").none(), nb::arg("dst"));
  m.def("repack", &repack);
  m.def("direct", [](const std::string& format) { return std::string(format_info(format_info(format_from_name(format)).direct).name); });
  m.def("published", [](const std::string& format) { return format_info(format_from_name(format)).published(); });
  // Fills out [32 * n_panels, k] fp32 with the weights as the kernels see them, in panel order.
  m.def("unpack", [](const std::string& format, const InArray& weights, int n_panels, int k, const OutArray& out) {
    const PackedMatrix w = packed(format_from_name(format), weights, n_panels, k);
    auto* dst =
        reinterpret_cast<float*>(bytes("out", out, static_cast<std::size_t>(n_panels) * kPanelColumns * static_cast<std::size_t>(k) * 4));
    for (int c = 0; c < n_panels * kPanelColumns; ++c)
      for (int j = 0; j < k; ++j) *dst++ = w.weight(c / kPanelColumns, c % kPanelColumns, j);
  });
  m.def("quantize_rows", [](const std::string& isa, const InArray& rows, const OutArray& dst, const OutArray& scale) {
    TensorArg<InArray> r("testing", "rows", rows);
    TensorArg<OutArray> d("testing", "dst", dst);
    const int n = static_cast<int>(r.shape({-1, -1}).extent(0));
    d.dtype({Dtype::int8}).shape({n, -1}).rows_contiguous();
    kernels_for(isa_from_name(isa))
        .quantize_rows({r.data<void>(), r.stride(0), nullptr}, n, static_cast<int>(r.extent(1)), d.data<std::int8_t>(), d.stride(0),
                       reinterpret_cast<float*>(bytes("scale", scale, 4 * static_cast<std::size_t>(n))));
  });
  m.def("operand_bytes", [](const std::string& isa, const std::string& format, int n, int k) {
    const Kernel kernel(isa, format);
    return kernel.table.operand_bytes(kernel.format, n, k);
  });
  m.def(
      "pack_operand",
      [](const std::string& isa, const std::string& format, const InArray& rows, const std::optional<InArray>& index,
         const std::optional<InArray>& row_scale, int n, int k, const OutArray& dst) {
        const Kernel kernel(isa, format);
        kernel.table.pack_operand(kernel.format, rows_of("rows", rows, index),
                                  row_scale ? static_cast<const float*>(row_scale->data()) : nullptr, n, k,
                                  bytes("dst", dst, kernel.table.operand_bytes(kernel.format, n, k)));
      },
      nb::arg("isa"), nb::arg("format"), nb::arg("rows"), nb::arg("index").none(), nb::arg("row_scale").none(), nb::arg("m"), nb::arg("k"),
      nb::arg("dst"));
  m.def("forward", &forward);
  m.def("forward_taken", &forward_taken);
  m.def("grad_operand_bytes",
        [](const std::string& isa, int n, int n_panels) { return kernels_for(isa_from_name(isa)).grad_operand_bytes(n, n_panels); });
  m.def(
      "pack_grad_operand",
      [](const std::string& isa, const InArray& dy, const std::optional<InArray>& index, const std::optional<InArray>& column_scale, int n,
         int columns, int n_panels, const OutArray& dst) {
        const KernelTable& k = kernels_for(isa_from_name(isa));
        k.pack_grad_operand(rows_of("dy", dy, index), column_scale ? static_cast<const float*>(column_scale->data()) : nullptr, n, columns,
                            n_panels, bytes("dst", dst, k.grad_operand_bytes(n, n_panels)));
      },
      nb::arg("isa"), nb::arg("dy"), nb::arg("index").none(), nb::arg("column_scale").none(), nb::arg("m"), nb::arg("columns"),
      nb::arg("n_panels"), nb::arg("dst"));
  m.def("backward", &backward);
  m.def("outer_operand_bytes",
        [](const std::string& isa, int n, int columns) { return kernels_for(isa_from_name(isa)).outer_operand_bytes(n, columns); });
  m.def("pack_outer_operand", [](const std::string& isa, const InArray& p, int n, int columns, const OutArray& dst) {
    const KernelTable& k = kernels_for(isa_from_name(isa));
    const RowSource rows = rows_of("p", p, std::nullopt);
    k.pack_outer_operand(static_cast<const bf16*>(rows.base), rows.ld, n, columns, bytes("dst", dst, k.outer_operand_bytes(n, columns)));
  });
  m.def(
      "outer",
      [](const std::string& isa, const InArray& operand, int n, int columns, const InArray& q, const std::optional<InArray>& index,
         int tile_stride, int n_tiles, const OutArray& out, bool accumulate) {
        TensorArg<OutArray> o("testing", "out", out);
        o.dtype({Dtype::fp32}).shape({columns, 16 * n_tiles});
        kernels_for(isa_from_name(isa))
            .outer(bytes("operand", operand, 0), n, columns, rows_of("q", q, index), tile_stride, n_tiles, o.data<float>(), o.stride(0),
                   accumulate);
      },
      nb::arg("isa"), nb::arg("operand"), nb::arg("m"), nb::arg("p_columns"), nb::arg("q"), nb::arg("index").none(), nb::arg("tile_stride"),
      nb::arg("n_tiles"), nb::arg("out"), nb::arg("accumulate"));
  m.def("activate", [](const std::string& isa, const std::string& activation, float limit, float alpha, const InArray& c, int n,
                       int n_panels, const OutArray& h, const OutArray& gate_up) {
    const Activation act = Activation::from_name(activation, limit, alpha);
    const auto* src = reinterpret_cast<const float*>(bytes("c", c, c_block_floats(n) * static_cast<std::size_t>(n_panels) * 4));
    TensorArg<OutArray> a("testing", "h", h), b("testing", "gate_up", gate_up);
    a.dtype({Dtype::bf16}).shape({n, act.h_per_panel() * n_panels});
    b.dtype({Dtype::bf16}).shape({n, 32 * n_panels});
    kernels_for(isa_from_name(isa)).activate(act, src, n, n_panels, a.data<bf16>(), a.stride(0), b.data<bf16>(), b.stride(0));
  });
  m.def("activate_backward",
        [](const std::string& isa, const std::string& activation, float limit, float alpha, const InArray& dh, int n, int n_panels,
           const InArray& gate_up, const InArray& weight, const OutArray& dgate_up, const OutArray& h, const OutArray& dot) {
          const Activation act = Activation::from_name(activation, limit, alpha);
          const int blocks = ceil_div(n_panels, act.projections());
          const auto* src = reinterpret_cast<const float*>(bytes("dh", dh, c_block_floats(n) * static_cast<std::size_t>(blocks) * 4));
          TensorArg<InArray> gu("testing", "gate_up", gate_up);
          TensorArg<OutArray> d("testing", "dgate_up", dgate_up), a("testing", "h", h);
          gu.dtype({Dtype::bf16}).shape({n, 32 * n_panels});
          d.dtype({Dtype::bf16}).shape({n, 32 * n_panels});
          a.dtype({Dtype::bf16}).shape({n, act.h_per_panel() * n_panels});
          const std::size_t rows = 4 * static_cast<std::size_t>(n);
          kernels_for(isa_from_name(isa))
              .activate_backward(act, src, n, n_panels, gu.data<bf16>(), gu.stride(0),
                                 reinterpret_cast<const float*>(bytes("weight", weight, rows)), d.data<bf16>(), d.stride(0), a.data<bf16>(),
                                 a.stride(0), reinterpret_cast<float*>(bytes("dot", dot, rows)));
        });
  m.def("add_bias", [](const std::string& isa, const OutArray& c, int n, int n_blocks, const InArray& bias) {
    const std::size_t blocks = static_cast<std::size_t>(n_blocks);
    kernels_for(isa_from_name(isa))
        .add_bias(reinterpret_cast<float*>(bytes("c", c, c_block_floats(n) * blocks * 4)), n, n_blocks,
                  reinterpret_cast<const float*>(bytes("bias", bias, 32 * blocks * 4)));
  });
  m.def("dot_rows", [](const std::string& isa, const InArray& rows, const InArray& v, const OutArray& dot) {
    const RowSource source = rows_of("rows", rows, std::nullopt);
    const int n = static_cast<int>(rows.shape(0)), columns = static_cast<int>(rows.shape(1));
    kernels_for(isa_from_name(isa))
        .dot_rows(source, n, reinterpret_cast<const float*>(bytes("v", v, static_cast<std::size_t>(round_up(columns, 16)) * 4)), columns,
                  reinterpret_cast<float*>(bytes("dot", dot, 4 * static_cast<std::size_t>(n))));
  });
  m.def("c_to_bf16",
        [](const std::string& isa, const InArray& c, int n, int n_blocks, float factor, const InArray& row_factor, const OutArray& dst) {
          const auto* src = reinterpret_cast<const float*>(bytes("c", c, c_block_floats(n) * static_cast<std::size_t>(n_blocks) * 4));
          TensorArg<OutArray> d("testing", "dst", dst);
          d.dtype({Dtype::bf16}).shape({n, 32 * n_blocks});
          const auto* factors = reinterpret_cast<const float*>(bytes("row_factor", row_factor, 4 * static_cast<std::size_t>(n)));
          kernels_for(isa_from_name(isa)).c_to_bf16(src, n, n_blocks, factor, factors, d.data<bf16>(), d.stride(0));
        });
  m.def("c_to_rows", [](const std::string& isa, const InArray& c, int n, int n_blocks, const OutArray& dst) {
    const auto* src = reinterpret_cast<const float*>(bytes("c", c, c_block_floats(n) * static_cast<std::size_t>(n_blocks) * 4));
    TensorArg<OutArray> d("testing", "dst", dst);
    const KernelTable& kernels = kernels_for(isa_from_name(isa));
    d.dtype({Dtype::fp32, Dtype::bf16}).shape({n, 32 * n_blocks});
    if (d.is(Dtype::bf16))
      kernels.stream_rows(src, n, n_blocks, d.data<bf16>(), d.stride(0));
    else
      kernels.c_to_rows(src, n, n_blocks, d.data<float>(), d.stride(0));
  });
  m.def("combine", [](const std::string& isa, const InArray& rows, const InArray& row_of, const InArray& weight, const OutArray& sum) {
    TensorArg<InArray> r("testing", "rows", rows), index("testing", "row_of", row_of), w("testing", "weight", weight);
    TensorArg<OutArray> out("testing", "sum", sum);
    const int n = static_cast<int>(out.dtype({Dtype::fp32}).shape({-1}).extent(0)), top_k = static_cast<int>(index.extent(0));
    r.dtype({Dtype::fp32, Dtype::bf16}).shape({-1, n});
    index.dtype({Dtype::int32}).shape({top_k});
    w.dtype({Dtype::fp32}).shape({top_k});
    const KernelTable& kernels = kernels_for(isa_from_name(isa));
    if (r.is(Dtype::bf16))
      kernels.combine_bf16(r.data<bf16>(), r.stride(0), index.data<std::int32_t>(), w.data<float>(), top_k, n, out.data<float>());
    else
      kernels.combine(r.data<float>(), r.stride(0), index.data<std::int32_t>(), w.data<float>(), top_k, n, out.data<float>());
  });
  m.def("round_row", [](const std::string& isa, const InArray& src, const OutArray& dst) {
    TensorArg<InArray> s("testing", "src", src);
    TensorArg<OutArray> d("testing", "dst", dst);
    const int n = static_cast<int>(s.dtype({Dtype::fp32}).shape({-1}).extent(0));
    d.dtype({Dtype::bf16}).shape({n});
    kernels_for(isa_from_name(isa)).round_row(s.data<float>(), n, d.data<bf16>());
  });
  m.def("waiting_bytes", &RecycledBuffer::waiting_bytes);
  // The n-th allocation of a buffer from now fails; 0 stops that. Returns how many were still to come.
  m.def("fail_allocation", [](int n) { return failing_allocation.exchange(n); });
  // `tasks` tasks on each sub-pool; those from `from` on fail, on all sub-pools or on `part` alone. The pool's error path.
  m.def(
      "failing_job",
      [](SubPools& pools, int tasks, int from, int part) {
        const WithoutGil nogil;
        SubPools::Session session(pools, pools.count());
        session.each([&](int p) {
          session.part(p).parallel_for(tasks, [&](int task, int) {
            require(task < from || (part >= 0 && part != p), ErrorKind::runtime, "[failing_job] task ", task);
          });
        });
      },
      nb::arg("pool"), nb::arg("tasks"), nb::arg("from_task"), nb::arg("part") = -1);
}

}  // namespace ktmoe
