// For tests on hosts without AMX: the tile algorithm and its operands on software tiles and portable vectors. Never chosen by itself.
#include <bit>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

namespace ktmoe {
namespace emulated_amx {
// clang-format off: each part needs the ones before it
#include "kernels/vec_portable.h"
#include "kernels/vec_emulated.h"
#include "kernels/vector-inl.h"
#include "kernels/tiles_software.h"
#include "kernels/amx_fp8-inl.h"
#include "kernels/amx-inl.h"
// clang-format on
using Gemm = TileGemm<EmulatedVec, SoftwareTiles, VectorGemm<EmulatedVec>>;
constexpr KernelTable table = make_table<Gemm, EmulatedVec>(Isa::emulated_amx);
}  // namespace emulated_amx

const KernelTable& emulated_amx_kernels() {
  return emulated_amx::table;
}

}  // namespace ktmoe
