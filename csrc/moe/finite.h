// check_finite=True: a number that is not finite is an error that says where it is, instead of a row of NaN.
#pragma once

#include "moe/part.h"

namespace ktmoe {

// rows: [n][columns]. ValueError naming the first NaN or infinity by row and column; `argument` as Python knows it.
void check_finite(const char* function, const char* argument, Tokens rows, int n, int columns);

// The weights of entries that are routed: [n_tokens][top_k].
void check_finite(const char* function, const Routing& routing, const MoeConfig& config);

}  // namespace ktmoe
