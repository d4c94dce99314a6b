// promises_test.cc - the bitwise promises: threads and their order, runs, batch splits, the floating-point environment.
#include <gtest/gtest.h>

#include <cfenv>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "case.h"

namespace pnn_test {
namespace {

// Random data of every kind, large enough to be cut into several pieces.
std::vector<Case> cases() {
  std::vector<Case> list;
  uint64_t seed = 1;
  for (const TypePair pair : type_pairs()) {
    for (int variant = 0; variant < 8; variant++) {
      Case c;
      set_types(c, pair);
      c.B = 5, c.C = 12, c.T = 18, c.H = 13, c.W = 21, c.M = variant % 2 ? 3 : 1, c.groups = variant % 3 ? 1 : 3;
      c.noise = static_cast<pnn_noise>(variant % PNN_NOISE_COUNT);
      c.shared = c.noise != PNN_NOISE_NONE && variant % 4 == 1;
      c.activation = static_cast<pnn_activation>(variant);
      c.stride_h = variant == 5 ? 2 : 1, c.stride_w = variant >= 5 ? 2 : 1;
      c.norm = variant % 4 >= 2, c.training = variant == 3 || variant == 6, c.eps = 1e-5;
      c.fill = Fill::kRandom, c.level = 0.3, c.seed = seed++;
      if (variant == 4)
        c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = LayoutKind::kChannelsLast;
      if (variant == 7) c.B = 61, c.H = 4, c.W = 4;
      list.push_back(c);
    }
    // One image, wide: pieces within an image. Many maps: pieces of the weight gradient.
    Case c;
    set_types(c, pair);
    c.C = 3, c.T = 7, c.H = 61, c.W = 67, c.norm = c.training = true, c.eps = 1e-5, c.fill = Fill::kRandom,
    c.seed = seed++;
    list.push_back(c);
    c.C = 150, c.T = 30, c.H = 7, c.W = 7, c.B = 9, c.M = 2, c.noise = PNN_NOISE_TENSOR, c.seed = seed++;
    list.push_back(c);
    // Few pixels, many outputs: the weight gradient's outputs are cut, and the last cut may be left with none.
    c.C = 6, c.T = 66, c.H = 5, c.W = 3, c.B = 2, c.M = 4, c.seed = seed++;
    list.push_back(c);
    // Whole tiles of one image, then tiles that span images; zeros, infinities and NaN among the data.
    c = Case();
    set_types(c, pair);
    c.gradients = kGradInput | kGradWeight | kGradBias, c.noise = PNN_NOISE_TENSOR, c.fill = Fill::kSpecial;
    c.C = 34, c.T = 40, c.H = 16, c.W = 20, c.B = 3, c.seed = seed++;
    list.push_back(c);
    c.C = 260, c.T = 18, c.H = 4, c.W = 12, c.B = 5, c.norm = true, c.activation = PNN_ACTIVATION_LEAKY_RELU;
    c.eps = 1e-5, c.fill = Fill::kRandom, c.seed = seed++;
    list.push_back(c);
    // Masks shared by many maps, trained: how many pixels a thread takes at a time must not change their gradients'
    // order.
    c = Case();
    set_types(c, pair);
    c.gradients = kGradInput | kGradMask, c.noise = PNN_NOISE_TENSOR, c.shared = true, c.fill = Fill::kRandom;
    c.C = 33, c.T = 5, c.H = 23, c.W = 24, c.B = 9, c.level = 0.3, c.seed = seed++;
    list.push_back(c);
    c.C = 40, c.M = 2, c.T = 7, c.H = 7, c.W = 7, c.B = 5, c.seed = seed++;
    list.push_back(c);
  }
  // A smaller scale (the sanitizers', say) keeps every so many.
  const size_t step = static_cast<size_t>(100 / std::min<int64_t>(scaled(100), 100));
  std::vector<Case> kept;
  for (size_t i = 0; i < list.size(); i += step) kept.push_back(list[i]);
  return kept;
}

std::vector<uint64_t> results(const Case &c, const pnn_host *host = nullptr) {
  Problem problem(c);
  EXPECT_EQ(problem.forward(host), PNN_OK) << problem.error.message;
  EXPECT_EQ(problem.backward(host), PNN_OK) << problem.error.message;
  return problem.result_bits();
}

TEST(Promises, ThreadsAndTheirOrder) {
  int64_t tasks = 0;
  for (const Case &c : cases()) {
    SCOPED_TRACE(c.describe());
    const std::vector<uint64_t> serial = results(c);
    ASSERT_GT(serial.size(), 100u);
    for (int32_t threads : {1, 2, 3, 7}) {
      for (TaskOrder order : {TaskOrder::kAscending, TaskOrder::kReversed, TaskOrder::kShuffled}) {
        if (threads == 1 && order == TaskOrder::kAscending) continue;
        ThreadHost host(threads, order);
        ASSERT_EQ(results(c, host.get()), serial) << threads << " threads";
        tasks += host.tasks();
      }
    }
  }
  EXPECT_GT(tasks, 20 * static_cast<int64_t>(cases().size())) << "the work was hardly divided";
}

TEST(Promises, MoreThreadsThanWork) {
  Case c;
  c.C = 2, c.T = 2, c.H = 2, c.W = 2, c.fill = Fill::kRandom;
  const std::vector<uint64_t> serial = results(c);
  for (int32_t threads : {16, 64}) {
    ThreadHost host(threads);
    EXPECT_EQ(results(c, host.get()), serial);
  }
}

TEST(Promises, DefaultHost) {
  for (const Case &c : cases()) {
    SCOPED_TRACE(c.describe());
    EXPECT_EQ(results(c, pnn_default_host()), results(c));
  }
}

TEST(Promises, RunToRun) {
  for (const Case &c : cases()) {
    SCOPED_TRACE(c.describe());
    ThreadHost host(2);
    const std::vector<uint64_t> first = results(c, host.get());
    for (int run = 0; run < 3; run++) EXPECT_EQ(results(c, host.get()), first);
  }
}

// Where the memory lies, what the workspace held and what surrounds a tensor does not matter.
TEST(Promises, MemoryDoesNotMatter) {
  for (Case c : cases()) {
    SCOPED_TRACE(c.describe());
    const std::vector<uint64_t> first = results(c);
    for (Placement placement : {Placement::kHeap, Placement::kEndsAtPage, Placement::kBeginsAtPage}) {
      for (Poison poison : {Poison::kNan, Poison::kLarge}) {
        c.placement = placement, c.poison = poison;
        EXPECT_EQ(results(c), first);
      }
    }
  }
}

// "and (forward, unless it takes the moments of the batch) for every split of the batch": each part of the batch,
// alone, gives the bits that it has in the whole. The input gradient, which sums over no images, holds to it as well.
TEST(Promises, BatchSplits) {
  int64_t compared = 0;
  for (Case c : cases()) {
    if (c.norm && c.training) c.training = false;
    SCOPED_TRACE(c.describe());
    Problem whole(c);
    ASSERT_EQ(whole.forward(), PNN_OK) << whole.error.message;
    ASSERT_EQ(whole.backward(), PNN_OK) << whole.error.message;
    const std::vector<uint64_t> output = whole.output.bits();
    const std::vector<uint64_t> grad_input = whole.grad_input.bits();
    const size_t image_out = output.size() / static_cast<size_t>(c.B);
    const size_t image_in = grad_input.size() / static_cast<size_t>(c.B);
    for (int64_t first = 0; first < c.B;) {
      const int64_t count = std::min<int64_t>(1 + first % 3, c.B - first);
      pnn_params &p = whole.params;
      const pnn_params saved = p;
      const auto narrow = [&](pnn_tensor &t, const pnn_tensor &from) {
        t.size[0] = count;
        t.data = static_cast<char *>(from.data) + first * from.stride[0] * static_cast<int64_t>(bytes_of(t.dtype));
      };
      narrow(p.input, saved.input);
      narrow(p.output, saved.output);
      narrow(p.grad_output, saved.grad_output);
      narrow(p.grad_input, saved.grad_input);
      ThreadHost host(3, TaskOrder::kReversed);
      whole.output.fill_poison(Poison::kNan);
      whole.grad_input.fill_poison(Poison::kNan);
      ASSERT_EQ(whole.run(PNN_PASS_FORWARD, host.get()), PNN_OK) << whole.error.message;
      ASSERT_EQ(whole.run(PNN_PASS_BACKWARD, host.get()), PNN_OK) << whole.error.message;
      p = saved;
      const std::vector<uint64_t> part = whole.output.bits();
      const std::vector<uint64_t> part_grad = whole.grad_input.bits();
      const size_t b = static_cast<size_t>(first);
      const size_t e = static_cast<size_t>(first + count);
      for (size_t i = 0; i < output.size(); i++) {
        const bool inside = i >= b * image_out && i < e * image_out;
        ASSERT_EQ(part[i], inside ? output[i] : ~uint64_t{0}) << "output " << i << " of images " << b << " to " << e;
      }
      for (size_t i = b * image_in; i < e * image_in; i++) ASSERT_EQ(part_grad[i], grad_input[i]) << "grad_input " << i;
      first += count;
      compared++;
    }
  }
  EXPECT_GT(compared, static_cast<int64_t>(cases().size()));
}

// Layouts change where numbers stand, not the numbers: output and input gradient (sums over no pixels).
TEST(Promises, LayoutsGiveTheSameOutput) {
  for (Case c : cases()) {
    if (c.norm && c.training) continue;
    SCOPED_TRACE(c.describe());
    Problem first(c);
    ASSERT_EQ(first.forward(), PNN_OK);
    ASSERT_EQ(first.backward(), PNN_OK);
    for (LayoutKind kind : output_layouts()) {
      Case d = c;
      d.input_layout = d.output_layout = d.grad_output_layout = d.grad_input_layout = d.mask_layout = kind;
      Problem second(d);
      second.set_mask_seed(static_cast<int64_t>(first.mask_seed()));
      for (auto member : {&Problem::input, &Problem::weight, &Problem::bias, &Problem::mask, &Problem::grad_output,
                          &Problem::norm_weight, &Problem::norm_bias, &Problem::mean, &Problem::variance}) {
        int64_t i = 0;
        (second.*member).fill([&] { return (first.*member).value(i++); });
      }
      ASSERT_EQ(second.forward(), PNN_OK);
      ASSERT_EQ(second.backward(), PNN_OK);
      EXPECT_EQ(second.output.bits(), first.output.bits()) << name_of(kind);
      EXPECT_EQ(second.grad_input.bits(), first.grad_input.bits()) << name_of(kind);
    }
  }
}

#if defined(__x86_64__)
constexpr unsigned kFlush = 0x8040;  // flush to zero, denormals are zero

// A rounding mode other than nearest, and denormals flushed: what some programs set for speed.
void disturb(int rounding) {
  std::fesetround(rounding);
  _mm_setcsr(_mm_getcsr() | kFlush);
}

TEST(Promises, FloatingPointEnvironmentNeitherMattersNorChanges) {
  std::vector<Case> list = cases();
  for (const TypePair pair : type_pairs()) {
    Case c;
    set_types(c, pair);
    c.C = 7, c.T = 6, c.W = 50, c.fill = Fill::kTiny, c.activation = PNN_ACTIVATION_IDENTITY,
    c.noise = PNN_NOISE_TENSOR;
    list.push_back(c);
  }
  for (const Case &c : list) {
    SCOPED_TRACE(c.describe());
    const std::vector<uint64_t> expected = results(c);
    for (int rounding : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
      Problem problem(c);  // filled in the default environment
      for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
        for (const bool threads : {false, true}) {
          // The workers' environment is the host's, and stays as it is, too.
          std::atomic<int> changed{0};
          ThreadHost host(
              2, TaskOrder::kAscending, [rounding] { disturb(rounding); },
              [rounding, &changed] {
                if (std::fegetround() != rounding || (_mm_getcsr() & kFlush) != kFlush) changed++;
              });
          const unsigned saved = _mm_getcsr();
          disturb(rounding);
          const unsigned control = _mm_getcsr() & ~0x3fu;  // without the sticky exception flags
          const pnn_status status = problem.run(pass, threads ? host.get() : nullptr);
          const unsigned after = _mm_getcsr() & ~0x3fu;
          const int rounding_after = std::fegetround();
          std::fesetround(FE_TONEAREST);
          _mm_setcsr(saved);
          ASSERT_EQ(status, PNN_OK) << problem.error.message;
          EXPECT_EQ(after, control);
          EXPECT_EQ(rounding_after, rounding);
          EXPECT_EQ(changed, 0);
        }
      }
      EXPECT_EQ(problem.result_bits(), expected) << "rounding mode " << rounding;
    }
  }
}

TEST(Promises, EnvironmentAfterARefusedCall) {
  Case c;
  Problem problem(c);
  problem.params.groups = 0;
  const unsigned saved = _mm_getcsr();
  disturb(FE_UPWARD);
  const unsigned control = _mm_getcsr() & ~0x3fu;
  const pnn_status status = pnn_forward(&problem.params, nullptr, nullptr);
  const unsigned after = _mm_getcsr() & ~0x3fu;
  std::fesetround(FE_TONEAREST);
  _mm_setcsr(saved);
  EXPECT_NE(status, PNN_OK);
  EXPECT_EQ(after, control);
}

TEST(Promises, MasksInADisturbedEnvironment) {
  for (pnn_noise noise : {PNN_NOISE_UNIFORM, PNN_NOISE_NORMAL, PNN_NOISE_WAVES}) {
    for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16}) {
      Random random(1);
      const int64_t seed = 8;
      Tensor expected(type, {4, 3, 9, 17}, LayoutKind::kContiguous, random, Placement::kZones, Poison::kNan, 0);
      Tensor got(type, {4, 3, 9, 17}, LayoutKind::kContiguous, random, Placement::kZones, Poison::kNan, 0);
      ASSERT_EQ(pnn_mask_fill(&expected.view(), noise, 0, &seed, nullptr, nullptr), PNN_OK);
      const unsigned saved = _mm_getcsr();
      disturb(FE_UPWARD);
      const unsigned control = _mm_getcsr() & ~0x3fu;
      const pnn_status status = pnn_mask_fill(&got.view(), noise, 0, &seed, nullptr, nullptr);
      const unsigned after = _mm_getcsr() & ~0x3fu;
      std::fesetround(FE_TONEAREST);
      _mm_setcsr(saved);
      ASSERT_EQ(status, PNN_OK);
      EXPECT_EQ(after, control);
      EXPECT_EQ(got.bits(), expected.bits()) << name_of(noise) << " " << name_of(type);
    }
  }
}
#endif

}  // namespace
}  // namespace pnn_test
