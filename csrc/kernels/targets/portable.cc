// Kernels for any CPU.
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

namespace ktmoe {
namespace portable {
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
#include "kernels/table-inl.h"
// clang-format on
constexpr KernelTable table = make_table<VectorGemm<Vec, Int8PairDot<Vec>>, Vec>(Isa::portable, 64);
}  // namespace portable

const KernelTable& portable_kernels() {
  return portable::table;
}

}  // namespace ktmoe
