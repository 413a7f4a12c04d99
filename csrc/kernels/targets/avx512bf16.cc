// Kernels for AVX-512 with VNNI, VBMI and BF16.
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
namespace avx512bf16 {
// clang-format off: each part needs the ones before it
#include "kernels/vec_avx512.h"
#include "kernels/vec_vnni.h"
#include "kernels/vec_bf16.h"
#include "kernels/vector-inl.h"
// clang-format on
constexpr KernelTable table = make_table<VectorGemm<Bf16Vec>, Bf16Vec>(Isa::avx512bf16);
constexpr KernelTable far_table = make_table<VectorGemm<FarBf16Vec>, Bf16Vec>(Isa::avx512bf16);
}  // namespace avx512bf16
}  // namespace ktmoe

#pragma GCC pop_options

namespace ktmoe {
const KernelTable& avx512bf16_kernels() {
  return zen4 ? avx512bf16::far_table : avx512bf16::table;
}
}  // namespace ktmoe
