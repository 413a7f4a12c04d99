// Published weights into tiles: the same numbers, 16 columns interleaved.
#pragma once

#include "moe/raw_matrix.h"

namespace ktmoe {

// Rows [first, min(first + 16, n)) of a published matrix become the columns of one tile.
struct RawRows {
  const char* name;
  RawBlock matrix;
  int first, n;
};

// Panels [p0, p1) of `layout` at `dst`; rows_of(p, t) gives the RawRows of tile t of panel p.
template <class RowsOf>
void repack_matrix(const PackedLayout& layout, int p0, int p1, RowsOf rows_of, std::byte* dst) {
  const FormatInfo& info = format_info(layout.format);
  require(info.published(), ErrorKind::value, "[load_expert_raw] format ", info.name, " is made from bf16 weights: expected load_expert");
  const RawStrides strides(info, layout.k);
  const int a_tile = info.k_step / info.block, a_row = ceil_div(layout.k, info.block);
  for (int p = p0; p < p1; ++p)
    for (int t = 0; t < 2; ++t) {
      const RawRows rows = rows_of(p, t);
      std::byte* tile = dst + layout.panel_stride * static_cast<std::size_t>(p) + t * static_cast<std::ptrdiff_t>(info.tile_bytes);
      for (int s = 0; s < layout.k_steps; ++s, tile += 2 * static_cast<std::ptrdiff_t>(info.tile_bytes)) {
        std::memset(tile, 0, static_cast<std::size_t>(info.tile_bytes));
        for (int row = rows.first; row < rows.n && row < rows.first + kTileColumns; ++row)
          for (int b = 0; b < a_tile && s * a_tile + b < a_row; ++b) {
            const int block = s * a_tile + b, k = block * info.block, columns = layout.k - k < info.block ? layout.k - k : info.block;
            require(info.repack(strides.at(rows.matrix, row, block), row - rows.first, b, columns, tile), ErrorKind::value,
                    "[load_expert_raw] ", rows.name, ": row ", row, ", columns from ", k,
                    ": got a number that is not finite or out of range");
          }
      }
    }
}

}  // namespace ktmoe
