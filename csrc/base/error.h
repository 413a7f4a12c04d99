// One exception type for the whole engine; the bindings turn its kind into ValueError, TypeError, RuntimeError, ...
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace ktmoe {

enum class ErrorKind { value, type, runtime, memory };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& text) : std::runtime_error(text), kind(kind) {}
  const ErrorKind kind;
};

// Message style: "[function] what was wrong: got X, expected Y".
template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(kind, text.str());
}

template <class... Parts>
void require(bool holds, ErrorKind kind, const Parts&... parts) {
  if (!holds) fail(kind, parts...);
}

}  // namespace ktmoe
