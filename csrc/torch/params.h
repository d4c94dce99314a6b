// params.h - the one place where tensors become a pnn_params.
//
// What libpnn's own checks cannot see is refused here: devices, layouts, types that are not floating point, numbers of
// dimensions, names. Everything else is left to libpnn, whose sentences are passed on.
#ifndef TORCH_PNN_PARAMS_H
#define TORCH_PNN_PARAMS_H

#include <pnn/pnn.h>

#include "arguments.h"

namespace torch_pnn {

// One call's arguments under the names of the schemas.
struct Layer {
  // Every layer's first arguments; the reader stands at `input`.
  Layer(const char* op, Arguments& arguments) : op(op), input(arguments.tensor()), weight(arguments.tensor()) {}

  const char* op;
  Tensor input, weight;
  std::optional<Tensor> bias, mask, seed;
  int64_t masks = 1;
  bool shared_masks = false;
  std::string noise;
  double level = 1;
  std::string activation;
  std::vector<int64_t> stride;
  int64_t groups = 1;

  bool norm = false;
  bool training = false;
  double eps = 0;
  std::optional<Tensor> norm_weight, norm_bias;
  std::optional<Tensor> mean, variance;  // the running ones in evaluation

  std::optional<Tensor> grad_output;  // given = the backward pass
};

// What a pass writes. Its place in the params is planned first, so that libpnn can refuse the call before any memory
// is asked for; then the memory is allocated. A result that nobody asked for stays a tensor without elements.
class Results {
 public:
  Results(const char* op, pnn_params& params) : op_(op), params_(params) {}

  // Plans a result of up to four dimensions and returns its number; `place` lies in the params.
  size_t plan(pnn_tensor* place, const Shape& sizes, const Shape& strides, int32_t dtype);
  // A result without elements, for a gradient that is not wanted.
  size_t skip(int32_t dtype);
  // Asks libpnn for the pass's workspace, which checks the call, then allocates results and workspace and runs it.
  void run(pnn_pass pass);
  Tensor take(size_t number) { return *std::move(results_[number]->tensor); }

 private:
  struct Result {
    pnn_tensor* place;
    Shape sizes, strides;
    int32_t dtype;
    std::optional<Tensor> tensor;
  };

  Result& add(pnn_tensor* place, const Shape& sizes, const Shape& strides, int32_t dtype);

  const char* op_;
  pnn_params& params_;
  std::optional<Result> results_[6];  // as many as any operator returns
  size_t count_ = 0;
};

// Checks the arguments and describes them to libpnn; results are planned separately. The layer must outlive the params.
pnn_params make_params(const Layer& layer);

// The types that the results have, as numbers of the running PyTorch.
int32_t dtype_of(const Tensor& tensor);
int32_t statistics_dtype(const Tensor& input);

// [B, T, H', W'] for these arguments; zeros where a stride is not positive, which libpnn then refuses.
Shape output_sizes(const Layer& layer);

// Row-major strides.
Shape contiguous_strides(const Shape& sizes);

// Strides of a 4-d result in the memory format of `like`: channels_last where PyTorch's suggest_memory_format says so.
Shape strides_like(const Tensor& like, const Shape& sizes);

// A seed's value on the CPU: one int64.
const int64_t* seed_value(const char* op, const Tensor& seed);

// PNN_NOISE_UNIFORM for "uniform" and so on; refuses other names, listing these.
pnn_noise noise_kind(const char* op, const std::string& name);

// Throws libpnn's sentence where the status is not PNN_OK, with the schema's names for the arguments.
void check(const char* op, pnn_status status, const pnn_error& error, bool running_statistics = false);

// A new tensor from PyTorch's allocator on the CPU; refuses sizes that cannot be addressed and says when memory is out.
Tensor allocate(const char* op, const Shape& sizes, const Shape& strides, int32_t dtype);

// Where a result's elements are to be written; null where it has none.
void* data_of(const char* op, const Tensor& result);

// libpnn's view of a tensor that is read; for one without elements `data` points to a byte that is never read.
pnn_tensor describe(const char* op, const char* name, const Tensor& tensor, size_t dimensions);

// libpnn's type for a type of the running PyTorch; false where it has none.
bool pnn_dtype_of(int32_t dtype, pnn_dtype* result);

// A type's name for messages, for example "int64".
std::string dtype_name(int32_t dtype);

}  // namespace torch_pnn

#endif
