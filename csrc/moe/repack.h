// Published weights into tiles: the same numbers, 16 columns interleaved.
#pragma once

#include "format/packed_matrix.h"

namespace ktmoe {

// Rows [first, min(first + 16, n)) of a published matrix become the columns of one tile.
struct RawRows {
  const char* name;
  RawBlock matrix;
  int first, n;
};

// Bytes of one row of one part for k weights.
inline std::size_t raw_row_bytes(const RawPart& part, int k) {
  return part.block == 0 ? 0 : static_cast<std::size_t>(ceil_div(k, part.block)) * static_cast<std::size_t>(part.bytes);
}

// Panels [p0, p1) of `layout` at `dst`; rows_of(p, t) gives the RawRows of tile t of panel p.
template <class RowsOf>
void repack_matrix(const PackedLayout& layout, int p0, int p1, RowsOf rows_of, std::byte* dst) {
  const FormatInfo& info = format_info(layout.format);
  require(info.published(), ErrorKind::value, "[load_expert_raw] format ", info.name, " is made from bf16 weights: expected load_expert");
  for (int p = p0; p < p1; ++p)
    for (int t = 0; t < 2; ++t) {
      const RawRows rows = rows_of(p, t);
      std::byte* tile = dst + layout.panel_stride * static_cast<std::size_t>(p) + t * static_cast<std::ptrdiff_t>(info.tile_bytes);
      for (int s = 0; s < layout.k_steps; ++s, tile += 2 * static_cast<std::ptrdiff_t>(info.tile_bytes)) {
        std::memset(tile, 0, static_cast<std::size_t>(info.tile_bytes));
        for (int row = rows.first; row < rows.n && row < rows.first + kTileColumns; ++row)
          for (int k = s * info.k_step; k < (s + 1) * info.k_step && k < layout.k; k += info.block) {
            RawBlock block{};
            for (int i = 0; i < info.n_parts(); ++i) {
              const RawPart& part = info.parts[i];
              block.part[i] = rows.matrix.part[i] + raw_row_bytes(part, layout.k) * static_cast<std::size_t>(row) +
                              static_cast<std::ptrdiff_t>(k / part.block) * part.bytes;
            }
            const int columns = layout.k - k < info.block ? layout.k - k : info.block;
            require(info.repack(block, row - rows.first, k % info.k_step / info.block, columns, tile), ErrorKind::value,
                    "[load_expert_raw] ", rows.name, ": row ", row, ", columns from ", k,
                    ": got a number that is not finite or out of range");
          }
      }
    }
}

}  // namespace ktmoe
