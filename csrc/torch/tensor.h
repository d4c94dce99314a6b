// tensor.h - a tensor of PyTorch's as the operators hold it, and sizes without an allocation.
//
// torch::stable::Tensor would do, but it allocates a reference count of its own for each argument, and a call on a
// small input is made of such things (docs/decisions/0004-cpu-speed.md).
#ifndef TORCH_PNN_TENSOR_H
#define TORCH_PNN_TENSOR_H

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>

namespace torch_pnn {

// Throws where a call of the C interface failed. Its message is in PyTorch's log.
inline void expect(AOTITorchError code, const char* call) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("torch_pnn: PyTorch's ") + call + " failed");
}

// Numbers that live elsewhere: a tensor's own sizes or strides.
struct Numbers {
  const int64_t* data;
  size_t count;

  const int64_t* begin() const { return data; }
  const int64_t* end() const { return data + count; }
  size_t size() const { return count; }
  int64_t operator[](size_t i) const { return data[i]; }
};

// Up to four sizes or strides, held by value.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> values) : Shape(Numbers{values.begin(), values.size()}) {}
  explicit Shape(Numbers values) : count_(std::min(values.size(), size_t{4})) {
    std::copy_n(values.begin(), count_, values_);
  }

  size_t size() const { return count_; }
  int64_t operator[](size_t i) const { return values_[i]; }
  int64_t& operator[](size_t i) { return values_[i]; }
  const int64_t* data() const { return values_; }
  Numbers numbers() const { return {values_, count_}; }
  const int64_t* begin() const { return values_; }
  const int64_t* end() const { return values_ + count_; }

 private:
  size_t count_;
  int64_t values_[4] = {0, 0, 0, 0};
};

// Owns one reference to a tensor.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}

  AtenTensorHandle get() const { return handle_.get(); }
  // Hands the reference on: to PyTorch's stack, say.
  AtenTensorHandle release() { return handle_.release(); }

  Numbers sizes() const {
    int64_t* data = nullptr;
    expect(aoti_torch_get_sizes(get(), &data), "get_sizes");
    return {data, dimensions()};
  }
  Numbers strides() const {
    int64_t* data = nullptr;
    expect(aoti_torch_get_strides(get(), &data), "get_strides");
    return {data, dimensions()};
  }
  size_t dimensions() const {
    int64_t count = 0;
    expect(aoti_torch_get_dim(get(), &count), "get_dim");
    return static_cast<size_t>(count);
  }
  int64_t numel() const {
    int64_t count = 0;
    expect(aoti_torch_get_numel(get(), &count), "get_numel");
    return count;
  }
  Tensor clone() const {
    AtenTensorHandle copy = nullptr;
    expect(aoti_torch_clone(get(), &copy), "clone");
    return Tensor(copy);
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

}  // namespace torch_pnn

#endif
