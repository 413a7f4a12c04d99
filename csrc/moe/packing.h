// ExpertPacker: one expert as its owner holds it, and how it becomes packed bytes, in units that many threads can share.
#pragma once

#include "kernels/kernel_api.h"
#include "moe/partition.h"

namespace ktmoe {

class ExpertPacker {
 public:
  // The parts of each matrix as FormatInfo describes them, rows dense; bf16, and what is made from bf16: one part, the bf16 numbers.
  // gate is null where the activation has none. The matrices stay the caller's.
  ExpertPacker(const MoeConfig& config, const ExpertLayout& layout, const RawBlock& gate, const RawBlock& up, const RawBlock& down);

  int units() const;
  // A number in published bytes that is not finite is a ValueError naming matrix and row.
  void pack(int unit, std::byte* expert) const;

 private:
  void gate_up(int p0, int p1, std::byte* at) const;
  void plain(const char* name, const RawBlock& matrix, int rows, const PackedLayout& layout, int p0, int p1, std::byte* at) const;

  const MoeConfig& config_;
  const ExpertLayout& layout_;
  const KernelTable& kernels_;
  const RawBlock gate_, up_, down_;
};

// bf16 numbers as the one part that they are.
inline RawBlock raw_bf16(const bf16* matrix) {
  return {{reinterpret_cast<const std::byte*>(matrix)}};
}

}  // namespace ktmoe
