// The one thing that the engine asks of CUDA: to call a function when a stream gets to it. Nothing is linked or needed to build: the
// driver's library is opened when the first stream is seen.
#pragma once

#include <cstdint>

namespace ktmoe {

using CudaStream = std::uintptr_t;  // a CUstream; 0: the default stream of the current context

// function(data) runs on a thread of the driver, once all earlier work of the stream is done; later work waits for it. It must not call
// CUDA. In a stream that is being captured it becomes part of the graph. RuntimeError if there is no driver, or if it refuses.
void launch_host_function(CudaStream stream, void (*function)(void*), void* data);

}  // namespace ktmoe
