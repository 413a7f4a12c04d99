#include "moe/floats.h"

#include <algorithm>

#include "moe/raw_matrix.h"

namespace ktmoe {
namespace {

using Source = FloatMatrix<const void>;

// Weights [k0, k0 + block) of a row, zeros where the row has ended.
void take_block(const Source& src, int row, int k0, int block, float* w) {
  const int columns = std::min(block, src.k - k0);
  const std::ptrdiff_t at = row * src.ld + k0;
  if (src.is_bf16) {
    const bf16* from = static_cast<const bf16*>(src.data) + at;
    for (int j = 0; j < columns; ++j) w[j] = to_float(from[j]);
  } else {
    std::memcpy(w, static_cast<const float*>(src.data) + at, sizeof(float) * static_cast<std::size_t>(columns));
  }
  std::fill(w + columns, w + block, 0.0f);
}

// Blocks of `rows` follow each other in every part.
class BlockRows {
 public:
  static constexpr int kRows = 16, kBlocks = 16;

  BlockRows(const KernelTable& kernels, const FormatInfo& info, const Source& src, std::byte* const* parts)
      : kernels_(kernels), info_(info), strides_(info, src.k), src_(src), parts_(parts) {}

  void operator()(int unit, Scratch& scratch) const {
    const int a_row = ceil_div(src_.k, info_.block), end = std::min(kRows * (unit + 1), src_.n) * a_row;
    auto* w = scratch.take<float>(static_cast<std::size_t>(kBlocks * info_.block));
    for (int b = kRows * unit * a_row; b < end; b += kBlocks) {
      const int n = std::min(kBlocks, end - b);
      for (int i = 0; i < n; ++i) take_block(src_, (b + i) / a_row, (b + i) % a_row * info_.block, info_.block, w + i * info_.block);
      std::byte* to[kMostRawParts] = {};
      for (int p = 0; p < info_.n_parts(); ++p) to[p] = parts_[p] + strides_.offset(p, b / a_row, b % a_row);
      kernels_.quantize_blocks(info_.format, w, n, to);
    }
  }

 private:
  const KernelTable& kernels_;
  const FormatInfo& info_;
  const RawStrides strides_;
  const Source& src_;
  std::byte* const* parts_;
};

// FP8: blocks of 128 rows have a scale in common, and rows of codes are not padded.
class Fp8Rows {
 public:
  static constexpr int kRows = 128, kBlock = Fp8Format::block;

  Fp8Rows(const KernelTable& kernels, const Source& src, std::byte* const* parts)
      : kernels_(kernels), strides_(format_info(WeightFormat::fp8), src.k), src_(src), parts_(parts) {}

  void operator()(int unit, Scratch& scratch) const {
    const int a_row = ceil_div(src_.k, kBlock), row0 = kRows * unit, rows = std::min(kRows, src_.n - row0);
    auto* w = scratch.take<float>(kRows * kBlock);
    auto* codes = scratch.take<std::byte>(kRows * kBlock);
    auto* scales = scratch.take<float>(kRows);
    std::byte* const to[kMostRawParts] = {codes, reinterpret_cast<std::byte*>(scales)};
    for (int b = 0; b < a_row; ++b) {
      for (int r = 0; r < rows; ++r) take_block(src_, row0 + r, kBlock * b, kBlock, w + kBlock * r);
      kernels_.quantize_blocks(WeightFormat::fp8, w, rows, to);
      for (int r = 0; r < rows; ++r) {
        std::memcpy(parts_[0] + strides_.offset(0, row0 + r, b), codes + kBlock * r,
                    static_cast<std::size_t>(std::min(kBlock, src_.k - kBlock * b)));
        std::memcpy(parts_[1] + strides_.offset(1, row0 + r, b), scales + r, 4);
      }
    }
  }

 private:
  const KernelTable& kernels_;
  const RawStrides strides_;
  const Source& src_;
  std::byte* const* parts_;
};

class DecodedRows {
 public:
  static constexpr int kRows = 16;

  DecodedRows(const KernelTable& kernels, const FormatInfo& info, const RawBlock& src, const FloatMatrix<void>& dst)
      : kernels_(kernels), info_(info), strides_(info, dst.k), src_(src), dst_(dst) {}

  void operator()(int unit, Scratch& scratch) const {
    auto* w = scratch.take<float>(static_cast<std::size_t>(info_.block));
    for (int row = kRows * unit; row < std::min(kRows * (unit + 1), dst_.n); ++row)
      for (int b = 0; b < ceil_div(dst_.k, info_.block); ++b) {
        const int k0 = b * info_.block, columns = std::min(info_.block, dst_.k - k0);
        const std::ptrdiff_t at = row * dst_.ld + k0;
        info_.decode(strides_.at(src_, row, b), columns, w);
        if (dst_.is_bf16) {
          kernels_.round_row(w, columns, static_cast<bf16*>(dst_.data) + at);
        } else {
          std::memcpy(static_cast<float*>(dst_.data) + at, w, sizeof(float) * static_cast<std::size_t>(columns));
        }
      }
  }

 private:
  const KernelTable& kernels_;
  const FormatInfo& info_;
  const RawStrides strides_;
  const RawBlock src_;
  const FloatMatrix<void>& dst_;
};

template <class Rows>
void run(SubPools* pools, int n, const Rows& rows) {
  const int units = ceil_div(n, Rows::kRows);
  if (pools) return SubPools::Session(*pools, pools->count()).parallel_for(units, rows);
  Scratch scratch;
  for (int unit = 0; unit < units; ++unit, scratch.reset()) rows(unit, scratch);
}

}  // namespace

void quantize_matrix(SubPools* pools, Isa isa, WeightFormat format, const Source& src, std::byte* const* parts) {
  const FormatInfo& info = format_info(format);
  const KernelTable& kernels = kernels_for(isa);
  if (format == WeightFormat::fp8) return run(pools, src.n, Fp8Rows(kernels, src, parts));
  run(pools, src.n, BlockRows(kernels, info, src, parts));
}

void dequantize_matrix(SubPools* pools, Isa isa, WeightFormat format, const RawBlock& src, const FloatMatrix<void>& dst) {
  run(pools, dst.n, DecodedRows(kernels_for(isa), format_info(format), src, dst));
}

}  // namespace ktmoe
