// Typed array arguments: dtype, rank, shape, device and strides are checked here, once, with one message style.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "base/bf16.h"
#include "base/error.h"
#include "bindings/gil.h"

namespace ktmoe {

namespace nb = nanobind;
using InArray = nb::ndarray<nb::ro>;
using OutArray = nb::ndarray<>;

enum class Dtype { bf16, fp32, int32, int64, uint8, int8, boolean };

inline const char* dtype_name(Dtype d) {
  static constexpr const char* names[] = {"bf16", "fp32", "int32", "int64", "uint8", "int8", "bool"};
  return names[static_cast<int>(d)];
}

inline std::optional<Dtype> dtype_of(nb::dlpack::dtype d) {
  struct Known {
    int code, bits;
    Dtype dtype;
  };
  static constexpr Known known[] = {{4, 16, Dtype::bf16}, {2, 32, Dtype::fp32}, {0, 32, Dtype::int32}, {0, 64, Dtype::int64},
                                    {1, 8, Dtype::uint8}, {0, 8, Dtype::int8},  {6, 8, Dtype::boolean}};
  for (const Known& k : known)
    if (d.code == k.code && d.bits == k.bits && d.lanes == 1) return k.dtype;
  return std::nullopt;
}

// One argument of one function; the checks throw, the accessors then cannot go wrong.
template <class Array>
class TensorArg {
 public:
  TensorArg(const char* function, const char* name, const Array& array) : where_(std::string("[") + function + "] " + name), a_(array) {
    require(a_.device_type() == nb::device::cpu::value, ErrorKind::type, where_, " device: got DLPack device type ", a_.device_type(),
            ", expected the CPU");
  }

  TensorArg& dtype(std::initializer_list<Dtype> allowed) {
    std::string names;
    const auto got = dtype_of(a_.dtype());
    for (Dtype d : allowed) {
      if (got == d) return *this;
      names += (names.empty() ? "" : " or ") + std::string(dtype_name(d));
    }
    fail(ErrorKind::type, where_, " dtype: got ", got ? dtype_name(*got) : "an unsupported type", ", expected ", names);
  }
  // -1: any extent.
  TensorArg& shape(std::initializer_list<std::int64_t> expected) {
    bool same = a_.ndim() == expected.size();
    std::string want, got;
    std::size_t i = 0;
    for (std::int64_t e : expected) {
      if (same && e >= 0 && static_cast<std::int64_t>(a_.shape(i)) != e) same = false, i = 0;
      ++i;
      want += (want.empty() ? "" : ", ") + (e < 0 ? std::string("any") : std::to_string(e));
    }
    if (same) return *this;
    for (i = 0; i < a_.ndim(); ++i) got += (i ? ", " : "") + std::to_string(a_.shape(i));
    fail(ErrorKind::value, where_, " shape: got [", got, "], expected [", want, "]");
  }
  TensorArg& contiguous() {
    if (a_.nbytes() == 0) return *this;  // strides of nothing mean nothing
    std::int64_t stride = 1;
    for (std::size_t i = a_.ndim(); i-- > 0;) {
      require(a_.shape(i) <= 1 || a_.stride(i) == stride, ErrorKind::value, where_, " strides: got ", a_.stride(i), " in dimension ", i,
              ", expected ", stride, " (C-contiguous)");
      stride *= static_cast<std::int64_t>(a_.shape(i));
    }
    return *this;
  }
  TensorArg& rows_contiguous() {
    const std::size_t last = a_.ndim() - 1;
    require(a_.nbytes() == 0 || a_.shape(last) <= 1 || a_.stride(last) == 1, ErrorKind::value, where_, " strides: got ", a_.stride(last),
            " in the last dimension, expected 1");
    return *this;
  }

  bool is(Dtype d) const { return dtype_of(a_.dtype()) == d; }
  std::int64_t extent(std::size_t i) const { return static_cast<std::int64_t>(a_.shape(i)); }
  std::int64_t stride(std::size_t i) const { return a_.stride(i); }
  std::size_t bytes() const { return a_.nbytes(); }
  const std::string& where() const { return where_; }
  template <class T>
  auto* data() const {
    return static_cast<std::conditional_t<std::is_same_v<Array, InArray>, const T, T>*>(
        const_cast<void*>(static_cast<const void*>(a_.data())));
  }

 private:
  const std::string where_;
  const Array& a_;
};

}  // namespace ktmoe
