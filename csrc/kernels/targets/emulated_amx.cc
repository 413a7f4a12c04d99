// For tests on hosts without AMX: the tile algorithm on software tiles and portable vectors. Never chosen by itself.
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

namespace ktmoe {
namespace emulated_amx {
#include "kernels/vec_portable.h"
#include "kernels/vector-inl.h"
// clang-format off: it needs the ones before it
#include "kernels/tiles_software.h"
#include "kernels/amx-inl.h"
// clang-format on
using Gemm = TileGemm<Vec, SoftwareTiles, VectorGemm<Vec, Int8PairDot<Vec>>>;
constexpr KernelTable table = make_table<Gemm, Vec>(Isa::emulated_amx, 256);
}  // namespace emulated_amx

const KernelTable& emulated_amx_kernels() {
  return emulated_amx::table;
}

}  // namespace ktmoe
