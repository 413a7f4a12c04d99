// Kernels for AVX2 + FMA with AVX-VNNI. Standard headers come before the target region: code outside it must run on any x86-64.
#include <immintrin.h>

#include <bit>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")

namespace ktmoe {
namespace avxvnni {
// clang-format off: each part needs the ones before it
#include "kernels/vec_avx2.h"
#include "kernels/vec_avxvnni.h"
#include "kernels/vector-inl.h"
// clang-format on
constexpr KernelTable table = make_table<VectorGemm<VnniVec>, VnniVec>(Isa::avxvnni);
}  // namespace avxvnni
}  // namespace ktmoe

#pragma GCC pop_options

namespace ktmoe {
const KernelTable& avxvnni_kernels() {
  return avxvnni::table;
}
}  // namespace ktmoe
