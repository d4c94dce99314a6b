// arguments.h - reads an operator's arguments off PyTorch's stack, in the order of the schema.
//
// PyTorch's own unboxing (TORCH_BOX) leaks every string argument (2.11 to 2.13, stableivalue_conversions.h), and these
// operators take two a call. The reader owns what it takes, so a refused call frees everything.
#ifndef TORCH_PNN_ARGUMENTS_H
#define TORCH_PNN_ARGUMENTS_H

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor.h"

namespace torch_pnn {

// The one error type that can cross the stable ABI; Python sees a RuntimeError.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "torch_pnn::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  Tensor tensor() { return Tensor(take<AtenTensorHandle>()); }
  std::optional<Tensor> optional_tensor() {
    const std::optional<AtenTensorHandle> handle = take<std::optional<AtenTensorHandle>>();
    return handle ? std::optional<Tensor>(*handle) : std::nullopt;
  }
  int64_t integer() { return take<int64_t>(); }
  bool boolean() { return take<bool>(); }
  std::optional<bool> optional_boolean() { return take<std::optional<bool>>(); }
  double real() { return take<double>(); }
  std::vector<int64_t> integers() { return take<std::vector<int64_t>>(); }
  std::vector<bool> booleans() { return take<std::vector<bool>>(); }

  // A ScalarType? as the number that the running PyTorch gives it; nothing where it is None.
  std::optional<int32_t> optional_dtype() { return take<std::optional<int32_t>>(); }

  std::string string() {
    StringHandle handle = take<StringHandle>();
    const char* characters = nullptr;
    size_t length = 0;
    std::string result;
    if (torch_string_c_str(handle, &characters) == 0 && torch_string_length(handle, &length) == 0)
      result.assign(characters, length);
    torch_delete_string(handle);
    return result;
  }

 private:
  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

  StableIValue* next_;
};

}  // namespace torch_pnn

#endif
