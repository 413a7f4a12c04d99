// Packed bytes back into plain arrays: the way of an expert from here to a GPU, or to a file.
#pragma once

#include "format/packed_matrix.h"

namespace ktmoe {

// Which rows of the source a packed matrix holds in which tiles: `tile_of(row)` = {panel, tile}, column row % 16.
struct TileOfRow {
  bool paired;
  int which;  // of a paired matrix: 0 = gate, 1 = up
  int panel(int row) const { return row / (paired ? kTileColumns : kPanelColumns); }
  int tile(int row) const { return paired ? which : row / kTileColumns % 2; }
};

// Rows [row0, row1) of a matrix in a published format, bit for bit as they were repacked: parts as FormatInfo describes them, whole
// matrices.
void unpack_published(const PackedMatrix& w, TileOfRow place, int row0, int row1, std::byte* const* parts);

// The same of bf16: numbers [rows][k].
void unpack_bf16(const PackedMatrix& w, TileOfRow place, int row0, int row1, bf16* numbers);

// The same of int8 and int4: exact int8 numbers [rows][k], and one scale a row.
void unpack_int8(const PackedMatrix& w, TileOfRow place, int row0, int row1, std::int8_t* codes, float* scales);

}  // namespace ktmoe
