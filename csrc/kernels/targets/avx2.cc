// Kernels for AVX2 + FMA. Standard headers come before the target region: code outside it must run on any x86-64.
#include <immintrin.h>

#include <bit>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace ktmoe {
namespace avx2 {
#include "kernels/vec_avx2.h"
#include "kernels/vector-inl.h"
constexpr KernelTable table = make_table<VectorGemm<Vec>, Vec>(Isa::avx2);
}  // namespace avx2
}  // namespace ktmoe

#pragma GCC pop_options

namespace ktmoe {
const KernelTable& avx2_kernels() {
  return avx2::table;
}
}  // namespace ktmoe
