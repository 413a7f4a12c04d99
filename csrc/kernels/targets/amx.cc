// Kernels for AMX (bf16 and int8 tiles) with AVX-512 VNNI beside it for one or two rows and for everything elementwise.
#include <immintrin.h>

#include <bit>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12: its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace ktmoe {
namespace amx {
#include "kernels/vec_avx512.h"
#include "kernels/vec_vnni.h"
#include "kernels/vector-inl.h"
// clang-format off: it needs the ones before it
#include "kernels/tiles_hardware.h"
#include "kernels/amx-inl.h"
// clang-format on
using Gemm = TileGemm<VnniVec, HardwareTiles, VectorGemm<VnniVec>>;
constexpr KernelTable table = make_table<Gemm, VnniVec>(Isa::amx, 16 * Gemm::kMaxTiles);
}  // namespace amx
}  // namespace ktmoe

#pragma GCC pop_options

namespace ktmoe {
const KernelTable& amx_kernels() {
  return amx::table;
}
}  // namespace ktmoe
