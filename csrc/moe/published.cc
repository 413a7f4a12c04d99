// Repacking moves bits and, but for FP8's scale, changes none. So the way back need not be written down for each format: every bit of a
// block is sent through repack alone, and where it arrives is where it is fetched from.
#include "moe/published.h"

#include <bit>
#include <mutex>
#include <vector>

#include "moe/raw_matrix.h"

namespace ktmoe {
namespace {

struct Move {
  std::uint32_t from;      // bit of the tile
  std::uint16_t part, to;  // bit of this part of the block
};

// Of one column and one block of a tile.
using Moves = std::vector<Move>;

int block_bytes(const FormatInfo& info, int part) {
  return ceil_div(info.block, info.parts[part].block) * info.parts[part].bytes;
}

Moves find_moves(const FormatInfo& info, int column, int b) {
  Moves moves;
  std::vector<std::byte> source[kMostRawParts], tile(static_cast<std::size_t>(info.tile_bytes));
  for (int i = 0; i < info.n_parts(); ++i) source[i].resize(static_cast<std::size_t>(block_bytes(info, i)));
  for (int i = 0; i < info.n_parts(); ++i)
    for (std::size_t bit = 0; bit < 8 * source[i].size(); ++bit) {
      const std::byte mask{static_cast<unsigned char>(1u << bit % 8)};
      source[i][bit / 8] = mask;
      std::fill(tile.begin(), tile.end(), std::byte{0});
      const RawBlock block{{source[0].data(), source[1].data(), source[2].data()}};
      if (info.repack(block, column, b, info.block, tile.data()))  // false: a bit that no valid block has
        for (std::size_t at = 0; at < tile.size(); at += 8)
          for (auto word = load_as<std::uint64_t>(&tile[at]); word; word &= word - 1) {
            const auto from = static_cast<std::uint32_t>(8 * at) + static_cast<std::uint32_t>(std::countr_zero(word));
            moves.push_back({from, static_cast<std::uint16_t>(i), static_cast<std::uint16_t>(bit)});
          }
      source[i][bit / 8] = std::byte{0};
    }
  return moves;
}

// [block of the tile * 16 + column]
const std::vector<Moves>& moves_of(const FormatInfo& info) {
  static std::mutex mutex;
  static std::vector<std::vector<Moves>> tables(all_formats().size());
  const std::lock_guard guard(mutex);
  std::vector<Moves>& table = tables[static_cast<std::size_t>(info.format)];
  if (table.empty())
    for (int b = 0; b < info.k_step / info.block; ++b)
      for (int column = 0; column < kTileColumns; ++column) table.push_back(find_moves(info, column, b));
  return table;
}

}  // namespace

void unpack_published(const PackedMatrix& w, TileOfRow place, int row0, int row1, std::byte* const* parts) {
  const FormatInfo& info = format_info(w.layout().format);
  const bool is_fp8 = info.format == WeightFormat::fp8;
  const int k = w.layout().k;
  static const std::vector<Moves> kNone;
  const std::vector<Moves>& table = is_fp8 ? kNone : moves_of(info);
  const RawStrides strides(info, k);
  for (int row = row0; row < row1; ++row)
    for (int k0 = 0; k0 < k; k0 += info.block) {
      const std::byte* tile = w.tile(place.panel(row), place.tile(row), k0 / info.k_step);
      std::byte* to[kMostRawParts] = {};
      std::size_t size[kMostRawParts] = {};
      for (int i = 0; i < info.n_parts(); ++i) {
        const RawPart& part = info.parts[i];
        to[i] = parts[i] + strides.offset(i, row, k0 / info.block);
        size[i] = static_cast<std::size_t>(ceil_div(std::min(info.block, k - k0), part.block) * part.bytes);
        std::memset(to[i], 0, size[i]);
      }
      if (is_fp8) {
        for (int j = 0; j < static_cast<int>(size[0]); ++j) to[0][j] = tile_word(tile, 1 + j / 4, row % kTileColumns)[j % 4];
        const float scale = load_as<float>(tile_word(tile, 0, row % kTileColumns)) * 0x1p-120f;
        std::memcpy(to[1], &scale, sizeof scale);
        continue;
      }
      for (const Move& m : table[static_cast<std::size_t>(k0 % info.k_step / info.block * kTileColumns + row % kTileColumns)])
        if (m.to / 8u < size[m.part] && (tile[m.from / 8] >> m.from % 8 & std::byte{1}) != std::byte{0})
          to[m.part][m.to / 8] |= std::byte{static_cast<unsigned char>(1u << m.to % 8)};
    }
}

void unpack_bf16(const PackedMatrix& w, TileOfRow place, int row0, int row1, bf16* numbers) {
  const FormatInfo& info = format_info(w.layout().format);
  const int k = w.layout().k;
  for (int row = row0; row < row1; ++row)
    for (int j = 0; j < k; ++j)
      numbers[static_cast<std::ptrdiff_t>(row) * k + j] =
          to_bf16(info.dequantize(w.tile(place.panel(row), place.tile(row), j / info.k_step), row % kTileColumns, j % info.k_step, 1.0f));
}

void unpack_int8(const PackedMatrix& w, TileOfRow place, int row0, int row1, std::int8_t* codes, float* scales) {
  const FormatInfo& info = format_info(w.layout().format);
  const int k = w.layout().k;
  for (int row = row0; row < row1; ++row) {
    const int p = place.panel(row), t = place.tile(row), column = row % kTileColumns;
    scales[row] = w.scales()[p * kPanelColumns + t * kTileColumns + column];
    std::int8_t* out = codes + static_cast<std::ptrdiff_t>(row) * k;
    for (int j = 0; j < k; ++j)
      out[j] = static_cast<std::int8_t>(info.dequantize(w.tile(p, t, j / info.k_step), column, j % info.k_step, 1.0f));
  }
}

}  // namespace ktmoe
