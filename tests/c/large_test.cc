// large_test.cc - tensors that reach further than 32 bits: strides of more than 2^31 elements, in address space that is
// reserved but hardly touched. The test with more than 2^31 pixels takes minutes and is off by default:
//     large_test --gtest_also_run_disabled_tests
#include <gtest/gtest.h>

#include "case.h"

namespace pnn_test {
namespace {

// Address space without memory behind it until it is written.
class Reserve {
 public:
  explicit Reserve(size_t bytes) : bytes_(bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base_ = p == MAP_FAILED ? nullptr : static_cast<char *>(p);
  }
  ~Reserve() {
    if (base_ != nullptr) munmap(base_, bytes_);
  }
  Reserve(const Reserve &) = delete;
  Reserve &operator=(const Reserve &) = delete;
  char *get() const { return base_; }

 private:
  size_t bytes_;
  char *base_ = nullptr;
};

// Spreads the elements of `dense` with the given strides over reserved memory, runs, and gathers the result.
class Far {
 public:
  Far(const Tensor &dense, std::vector<int64_t> stride) : dense_(dense), view_(dense.view()) {
    int64_t span = 1;
    for (int d = 0; d < 4; d++) {
      if (d < static_cast<int>(stride.size())) view_.stride[d] = stride[static_cast<size_t>(d)];
      if (view_.size[d] > 1) span += (view_.size[d] - 1) * view_.stride[d];
    }
    memory_ = std::make_unique<Reserve>(static_cast<size_t>(span) * bytes_of(view_.dtype));
    view_.data = memory_->get();
  }
  bool there() const { return memory_->get() != nullptr; }
  const pnn_tensor &view() const { return view_; }
  void scatter() {
    int64_t i = 0;
    each([&](char *at) { store(view_.dtype, at, dense_.value(i++)); });
  }
  std::vector<uint64_t> bits() const {
    std::vector<uint64_t> result;
    each([&](char *at) {
      uint64_t b = 0;
      std::memcpy(&b, at, bytes_of(view_.dtype));
      result.push_back(b);
    });
    return result;
  }

 private:
  template <class F>
  void each(F f) const {
    for (int64_t i = 0; i < view_.size[0]; i++) {
      for (int64_t j = 0; j < view_.size[1]; j++) {
        for (int64_t k = 0; k < view_.size[2]; k++) {
          for (int64_t l = 0; l < view_.size[3]; l++) {
            const auto step = [&](int d, int64_t n) { return n > 0 ? n * view_.stride[d] : 0; };
            f(static_cast<char *>(view_.data) +
              (step(0, i) + step(1, j) + step(2, k) + step(3, l)) * static_cast<int64_t>(bytes_of(view_.dtype)));
          }
        }
      }
    }
  }

  const Tensor &dense_;
  pnn_tensor view_;
  std::unique_ptr<Reserve> memory_;
};

TEST(Large, StridesBeyond32Bits) {
  int64_t cases = 0;
  const int64_t far = (int64_t{1} << 31) + 7;
  for (const TypePair pair : type_pairs()) {
    for (int which = 0; which < 4; which++) {
      Case c;
      set_types(c, pair);
      c.B = 2, c.C = 2, c.H = 2, c.W = 3, c.T = 2, c.noise = PNN_NOISE_TENSOR, c.fill = Fill::kRandom;
      c.stride_w = which == 3 ? 2 : 1;
      SCOPED_TRACE(c.describe());
      Problem problem(c);
      ASSERT_EQ(problem.forward(), PNN_OK);
      ASSERT_EQ(problem.backward(), PNN_OK);
      // One dimension at a time is far: the batch, the channels, the rows, the columns.
      std::vector<int64_t> stride;
      switch (which) {
        case 0: stride = {far, 8, 3, 1}; break;
        case 1: stride = {8, far, 3, 1}; break;
        case 2: stride = {32, 8, far, 1}; break;
        default: stride = {32, 8, 2, far}; break;
      }
      Far x(problem.input, stride), y(problem.output, stride), g(problem.grad_output, stride),
          dx(problem.grad_input, stride);
      Far n(problem.mask, stride), dn(problem.grad_mask, stride);
      if (!x.there() || !y.there() || !g.there() || !dx.there() || !n.there() || !dn.there())
        GTEST_SKIP() << "no address space";
      x.scatter();
      g.scatter();
      n.scatter();
      const std::vector<uint64_t> expected[] = {problem.output.bits(), problem.grad_input.bits(),
                                                problem.grad_mask.bits()};
      problem.params.input = x.view();
      problem.params.output = y.view();
      problem.params.grad_output = g.view();
      problem.params.grad_input = dx.view();
      problem.params.mask = n.view();
      problem.params.grad_mask = dn.view();
      ASSERT_EQ(problem.run(PNN_PASS_FORWARD), PNN_OK) << problem.error.message;
      ASSERT_EQ(problem.run(PNN_PASS_BACKWARD), PNN_OK) << problem.error.message;
      EXPECT_EQ(y.bits(), expected[0]);
      EXPECT_EQ(dx.bits(), expected[1]);
      EXPECT_EQ(dn.bits(), expected[2]);
      cases++;
    }
  }
  EXPECT_EQ(cases, static_cast<int64_t>(type_pairs().size()) * 4);
}

// More than 2^31 pixels in one sum: the inputs are one image, repeated by a stride of zero; only the gradients of the
// weight and the bias are asked for, in float64, where they are exact.
TEST(Large, DISABLED_MoreThan31BitsOfPixels) {
  Case c;
  c.input_type = c.weight_type = PNN_FLOAT64;
  c.C = 1, c.T = 1, c.H = 1, c.W = 512, c.noise = PNN_NOISE_NONE, c.gradients = kGradWeight | kGradBias;
  Problem problem(c);
  ASSERT_EQ(problem.backward(), PNN_OK);
  const double one_weight = problem.grad_weight.value(0);
  const double one_bias = problem.grad_bias.value(0);
  const int64_t images = (int64_t{1} << 22) + 5;
  problem.params.input.size[0] = problem.params.grad_output.size[0] = images;
  problem.params.input.stride[0] = problem.params.grad_output.stride[0] = 0;
  ASSERT_EQ(problem.run(PNN_PASS_BACKWARD), PNN_OK) << problem.error.message;
  EXPECT_EQ(problem.grad_weight.value(0), one_weight * static_cast<double>(images));
  EXPECT_EQ(problem.grad_bias.value(0), one_bias * static_cast<double>(images));
}

}  // namespace
}  // namespace pnn_test
