// Memory on the NUMA node where it is used.
#pragma once

#include <cstddef>

namespace ktmoe {

// Asks the system to put pages of [data, data + bytes), page-aligned and not yet touched, on `node` while it has room. 0, or errno:
// containers often forbid this. A negative node asks for nothing.
int prefer_node(void* data, std::size_t bytes, int node);

// errno of an attempt with one page of memory.
int try_prefer_node(int node);

}  // namespace ktmoe
