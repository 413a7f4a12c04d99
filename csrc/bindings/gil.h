// Working without the GIL.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace ktmoe {

// As nanobind's gil_scoped_release, but survives the end of the interpreter: Python then ends a thread that asks for the GIL by
// pthread_exit, whose unwinding would reach frames that are noexcept and abort the process. Such a thread waits for the end instead.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace ktmoe
