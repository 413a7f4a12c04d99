#include "runtime/cuda_stream.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "base/error.h"

namespace ktmoe {
namespace {

// The names and types of cuda.h.
struct Driver {
  int (*launch_host_func)(void* stream, void (*function)(void*), void* data);
  int (*get_error_name)(int error, const char** name);

  explicit Driver(const std::string& library) {
    void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);  // for the life of the process
    require(handle, ErrorKind::runtime, "[CUDA] the driver library cannot be opened: ", handle ? "" : dlerror());
    find(handle, "cuLaunchHostFunc", launch_host_func);
    find(handle, "cuGetErrorName", get_error_name);
  }

 private:
  template <class F>
  static void find(void* handle, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(handle, name));
    require(function != nullptr, ErrorKind::runtime, "[CUDA] the driver library has no function ", name);
  }
};

// Of the library that KTMOE_CUDA_DRIVER names, or of the installed one.
const Driver& driver() {
  static std::mutex& mutex = *new std::mutex;
  static auto& drivers = *new std::map<std::string, Driver>;  // never destroyed: streams outlive static objects
  const char* const named = std::getenv("KTMOE_CUDA_DRIVER");
  const std::string library = named && *named ? named : "libcuda.so.1";
  const std::lock_guard guard(mutex);
  const auto found = drivers.find(library);
  return found != drivers.end() ? found->second : drivers.emplace(library, Driver(library)).first->second;
}

}  // namespace

void launch_host_function(CudaStream stream, void (*function)(void*), void* data) {
  const Driver& cuda = driver();
  const int error = cuda.launch_host_func(reinterpret_cast<void*>(stream), function, data);
  if (error == 0) return;
  const char* name = nullptr;
  cuda.get_error_name(error, &name);
  fail(ErrorKind::runtime, "[CUDA] cuLaunchHostFunc: got ", name ? name : "an unknown error", " (", error, ")");
}

}  // namespace ktmoe
