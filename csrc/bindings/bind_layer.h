// Arguments shared by direct and queued forwards.
#pragma once

#include "bindings/tensor_arg.h"
#include "moe/layer.h"

namespace ktmoe {

struct ForwardArgs {
  Tokens hidden;
  Routing routing;
};

// Checks and unpacks (hidden, ids, weights) for `function`.
ForwardArgs forward_args(const char* function, const MoeLayer& layer, const InArray& hidden, const InArray& ids, const InArray& weights);
bf16* forward_out(const char* function, const MoeLayer& layer, const ForwardArgs& args, const OutArray& out);

}  // namespace ktmoe
