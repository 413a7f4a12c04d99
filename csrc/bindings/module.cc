// The extension module: errors, then one init function per topic.
#include <nanobind/nanobind.h>

#include <new>

#include "base/error.h"

namespace nb = nanobind;

namespace ktmoe {

void init_cpu(nb::module_& m);
void init_runtime(nb::module_& m);
void init_layer(nb::module_& m);
void init_export(nb::module_& m);
void init_floats(nb::module_& m);
void init_job(nb::module_& m);
void init_stream(nb::module_& m);
void init_testing(nb::module_& m);
void init_queue_testing(nb::module_& m);

namespace {
PyObject* python_type(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::value:
      return PyExc_ValueError;
    case ErrorKind::type:
      return PyExc_TypeError;
    case ErrorKind::runtime:
      return PyExc_RuntimeError;
    case ErrorKind::memory:
      return PyExc_MemoryError;
  }
  return PyExc_RuntimeError;
}
}  // namespace

NB_MODULE(_ext, m) {
  nb::set_leak_warnings(false);  // engines live until the process ends, by design
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const Error& e) {
      PyErr_SetString(python_type(e.kind), e.what());
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_MemoryError, "[ktmoe] the system refused memory");
    }
  });
  init_cpu(m);
  init_runtime(m);
  init_layer(m);
  init_export(m);
  init_floats(m);
  init_job(m);
  init_stream(m);
  init_testing(m);
  init_queue_testing(m);
}

}  // namespace ktmoe
