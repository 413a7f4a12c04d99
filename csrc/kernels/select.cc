// From an ISA to its kernels.
#include "kernels/kernel_api.h"

namespace ktmoe {

#define KTMOE_ISA(id, name, test_only) const KernelTable& id##_kernels();
#include "base/isas.inc"
#undef KTMOE_ISA

const KernelTable& kernels_for(Isa isa) {
  switch (isa) {
#define KTMOE_ISA(id, name, test_only) \
  case Isa::id:                        \
    return id##_kernels();
#include "base/isas.inc"
#undef KTMOE_ISA
  }
  fail(ErrorKind::runtime, "[kernels] no such level");
}

}  // namespace ktmoe
