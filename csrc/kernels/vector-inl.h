// Every kernel of a vector level, in the order in which they need each other. Include inside the namespace of a level, after Vec.

// clang-format off
#include "kernels/unpack-inl.h"
#include "kernels/dot-inl.h"
#include "kernels/weight_order-inl.h"
#include "kernels/row_groups-inl.h"
#include "kernels/products-inl.h"
#include "kernels/block_dot-inl.h"
#include "kernels/int4_dot-inl.h"
#include "kernels/fp8_dot-inl.h"
#include "kernels/mac-inl.h"
#include "kernels/fp8_pairs-inl.h"
#include "kernels/gemm-inl.h"
#include "kernels/rounding-inl.h"
#include "kernels/quantize_int4-inl.h"
#include "kernels/quantize_q4_k-inl.h"
#include "kernels/quantize_blocks-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/activation-inl.h"
#include "kernels/table-inl.h"
// clang-format on
