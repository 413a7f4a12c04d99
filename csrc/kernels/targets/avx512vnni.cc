// Kernels for AVX-512 with VNNI.
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
namespace avx512vnni {
#include "kernels/vec_avx512.h"
#include "kernels/vec_vnni.h"
#include "kernels/vector-inl.h"
constexpr KernelTable table = make_table<VectorGemm<VnniVec>, VnniVec>(Isa::avx512vnni);
}  // namespace avx512vnni
}  // namespace ktmoe

#pragma GCC pop_options

namespace ktmoe {
const KernelTable& avx512vnni_kernels() {
  return avx512vnni::table;
}
}  // namespace ktmoe
