// What the experts make of their rows, kept until the experts of each token are summed up: outputs on the way forward, gradients of x on
// the way back.
//
// Few rows are fp32. Many go through DRAM twice, and there their bytes are a large part of the time that a batch takes: they are bf16, and
// written past the caches. That rounds every expert's share of a sum by 2^-9 of itself at most.
#pragma once

#include <atomic>

#include "kernels/kernel_api.h"
#include "runtime/scratch.h"

namespace ktmoe {

class ExpertRows {
 public:
  static constexpr int kManyRows = 1024;

  ExpertRows() = default;
  ExpertRows(Scratch& scratch, int rows, int hidden) : ld_(round_up(hidden, kPanelColumns)) {
    const std::size_t numbers = static_cast<std::size_t>(rows) * static_cast<std::size_t>(ld_);
    if (rows >= kManyRows)
      b16_ = scratch.take<bf16>(numbers);
    else
      f32_ = scratch.take<float>(numbers);
  }

  explicit operator bool() const { return f32_ || b16_; }
  int columns() const { return ld_; }

  // C blocks of m rows to rows [row, row + m), from `column` on, a multiple of 32.
  void store(const KernelTable& k, const float* c, int m, int n_blocks, int row, int column) const {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(row) * ld_ + column;
    if (b16_)
      k.stream_rows(c, m, n_blocks, b16_ + at, ld_);
    else
      k.c_to_rows(c, m, n_blocks, f32_ + at, ld_);
  }
  // To be called by the thread that stored, before another one combines: streamed stores are not ordered otherwise.
  void stored() const {
    if (b16_) std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  // sum[j], j < columns(): see KernelTable::combine.
  void combine(const KernelTable& k, const std::int32_t* row_of, const float* weight, int top_k, float* sum) const {
    if (b16_)
      k.combine_bf16(b16_, ld_, row_of, weight, top_k, ld_, sum);
    else
      k.combine(f32_, ld_, row_of, weight, top_k, ld_, sum);
  }

 private:
  float* f32_ = nullptr;
  bf16* b16_ = nullptr;
  int ld_ = 0;
};

}  // namespace ktmoe
