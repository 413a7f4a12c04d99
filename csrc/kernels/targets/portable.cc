// Kernels for any CPU.
#include <bit>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/kernel_api.h"

namespace ktmoe {
namespace portable {
#include "kernels/vec_portable.h"
#include "kernels/vector-inl.h"
constexpr KernelTable table = make_table<VectorGemm<Vec>, Vec>(Isa::portable);
}  // namespace portable

const KernelTable& portable_kernels() {
  return portable::table;
}

}  // namespace ktmoe
