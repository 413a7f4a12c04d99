// For tests on hosts without AMX: the tile algorithm on software tiles and portable vectors. Never chosen by itself.
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

namespace ktmoe {
namespace emulated_amx {
#include "kernels/vec_portable.h"
// clang-format off: each part needs the ones before it
#include "kernels/unpack-inl.h"
#include "kernels/dot-inl.h"
#include "kernels/row_groups-inl.h"
#include "kernels/block_dot-inl.h"
#include "kernels/fp8_dot-inl.h"
#include "kernels/mac-inl.h"
#include "kernels/gemm-inl.h"
#include "kernels/quantize_int4-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/activation-inl.h"
#include "kernels/tiles_software.h"
#include "kernels/amx-inl.h"
#include "kernels/table-inl.h"
// clang-format on
using Gemm = TileGemm<Vec, SoftwareTiles, VectorGemm<Vec, Int8PairDot<Vec>>>;
constexpr KernelTable table = make_table<Gemm, Vec>(Isa::emulated_amx, 256);
}  // namespace emulated_amx

const KernelTable& emulated_amx_kernels() {
  return emulated_amx::table;
}

}  // namespace ktmoe
