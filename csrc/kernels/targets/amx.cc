// Kernels for AMX (bf16 and int8 tiles) with AVX-512 VNNI beside it for one or two rows and for everything elementwise.
#include <immintrin.h>

#include <bit>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12: its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace ktmoe {
namespace amx {
// clang-format off: each part needs the ones before it
#include "kernels/vec_avx512.h"
#include "kernels/vec_vnni.h"
#include "kernels/vec_bf16.h"
#include "kernels/vector-inl.h"
#include "kernels/tiles_hardware.h"
#include "kernels/amx_fp8-inl.h"
#include "kernels/amx-inl.h"
// clang-format on
using Gemm = TileGemm<RoundingVec, HardwareTiles, VectorGemm<RoundingVec>>;
constexpr KernelTable table = make_table<Gemm, RoundingVec>(Isa::amx);
}  // namespace amx
}  // namespace ktmoe

#pragma GCC pop_options

namespace ktmoe {
const KernelTable& amx_kernels() {
  return amx::table;
}
}  // namespace ktmoe
