// Kernels for AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#include <bit>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12: its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace ktmoe {
namespace avx512 {
#include "kernels/vec_avx512.h"
#include "kernels/vector-inl.h"
constexpr KernelTable table = make_table<VectorGemm<Vec>, Vec>(Isa::avx512);
}  // namespace avx512
}  // namespace ktmoe

#pragma GCC pop_options

namespace ktmoe {
const KernelTable& avx512_kernels() {
  return avx512::table;
}
}  // namespace ktmoe
