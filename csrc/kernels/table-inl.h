// The table of one level: GEMMs from Gemm, everything else from Elementwise<V> and Activations<V>. Include inside the namespace of the
// level.

template <class Gemm, class V>
constexpr KernelTable make_table(Isa isa) {
  using E = Elementwise<V>;
  using A = Activations<V>;
  return {
      .isa = isa,
      .block_rows = Gemm::kBlockRows,
      .row_scales = &E::row_scales,
      .pack_tile = &E::pack_tile,
      .quantize_blocks = &BlockQuantizer<V>::blocks,
      .quantize_rows = &E::quantize_rows,
      .operand_bytes = &Gemm::operand_bytes,
      .pack_operand = &Gemm::pack_operand,
      .forward = &Gemm::forward,
      .grad_operand_bytes = &Gemm::grad_operand_bytes,
      .pack_grad_operand = &Gemm::pack_grad_operand,
      .backward = &Gemm::backward,
      .outer_operand_bytes = &Gemm::outer_operand_bytes,
      .pack_outer_operand = &Gemm::pack_outer_operand,
      .outer = &Gemm::outer,
      .add_bias = &E::add_bias,
      .activate = &A::activate,
      .activate_backward = &A::activate_backward,
      .dot_rows = &E::dot_rows,
      .c_to_bf16 = &E::c_to_bf16,
      .c_to_rows = &E::c_to_rows,
      .stream_rows = &E::stream_rows,
      .combine = &E::combine,
      .combine_bf16 = &E::combine_bf16,
      .round_row = &E::round_row,
  };
}
