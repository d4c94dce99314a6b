// exact_test.cc - the exact tier: on data whose sums are exact, results equal the plain loops bit for bit.
//
// Sweeps every type over ragged sizes (one below, at and above the tiles' and panels' edges), layouts, groups, strides,
// masks, activations and normalisation, forward and all gradients, in memory with guards around every tensor.
#include <gtest/gtest.h>

#include <set>

#include "case.h"

namespace pnn_test {
namespace {

const std::vector<int64_t> kColumns = {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 511, 512, 513};
const std::vector<int64_t> kRows = {1, 2, 5, 6, 7, 8, 9, 15, 16, 17, 33, 63, 65};

// Recipes give multiples of 2^-8; tensor masks here are multiples of 2^-3. Levels are powers of two.
double quantum(const Case &c) {
  const double mask = c.noise == PNN_NOISE_UNIFORM || c.noise == PNN_NOISE_WAVES ? 1.0 / 256 : 1.0 / 8;
  return std::min(mask * c.level, 1.0 / 8) * (c.norm ? 1.0 / 16 : 1.0);
}

void run(const Case &c) { check_exact(c, quantum(c)); }

class ExactTypes : public testing::TestWithParam<int> {
 protected:
  Case base() const {
    Case c;
    set_types(c, type_pairs()[static_cast<size_t>(GetParam())]);
    return c;
  }
};

std::string type_name(const testing::TestParamInfo<int> &info) {
  const TypePair pair = type_pairs()[static_cast<size_t>(info.param)];
  return std::string(name_of(pair.input)) + (pair.input == pair.weight ? "" : std::string("_") + name_of(pair.weight)) +
         (pair.exact ? "_exact" : "");
}

INSTANTIATE_TEST_SUITE_P(Exact, ExactTypes, testing::Range(0, static_cast<int>(type_pairs().size())), type_name);

TEST_P(ExactTypes, Columns) {
  uint64_t seed = 1;
  for (int64_t columns : kColumns) {
    Case c = base();
    c.C = 3, c.T = 5, c.W = columns, c.seed = seed++;
    run(c);
    // The same number of pixels as an image of several rows, and as several images.
    c.noise = PNN_NOISE_TENSOR, c.M = 2, c.H = 3, c.B = 2, c.seed = seed++;
    run(c);
    c.W = 1, c.H = 1, c.B = columns, c.seed = seed++;
    run(c);
  }
}

TEST_P(ExactTypes, OutputsAndMaps) {
  uint64_t seed = 100;
  for (int64_t T : kRows) {
    for (int64_t C : kRows) {
      Case c = base();
      c.T = T, c.C = C, c.H = 3, c.W = 7, c.seed = seed++;
      c.noise = C % 2 ? PNN_NOISE_UNIFORM : PNN_NOISE_TENSOR;
      run(c);
    }
  }
}

TEST_P(ExactTypes, WholeTilesAndTheirEdges) {
  // Tiles that are read and written where they stand, tiles that span images, last ones that are not whole, and more
  // maps than a block; nothing is trained but the weights, so that the shortest ways are taken.
  struct Size {
    int64_t C, T, H, W, B;
  };
  const std::vector<Size> sizes = {{2, 2, 8, 8, 2},    {16, 8, 8, 8, 3},   {34, 18, 16, 32, 1}, {66, 70, 7, 7, 5},
                                   {258, 10, 4, 8, 3}, {10, 258, 5, 7, 2}, {32, 32, 1, 33, 2},  {6, 40, 23, 23, 2},
                                   {64, 64, 1, 1, 45}, {18, 36, 31, 1, 2}, {31, 33, 8, 12, 2}};
  uint64_t seed = 250;
  const uint64_t step = scaled(100) < 100 ? 3 : 1;  // a smaller scale (the sanitizers') keeps a third
  for (const Size &size : sizes) {
    for (LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kChannelsLast}) {
      for (int64_t groups : {1, 2}) {
        for (int64_t M : {1, 2}) {
          if (size.C % groups || size.T % groups || (M > 1 && size.C > 100)) continue;
          if (++seed % step) continue;
          Case c = base();
          c.C = size.C, c.T = size.T, c.H = size.H, c.W = size.W, c.B = size.B, c.groups = groups, c.M = M;
          c.noise = seed % 3 ? PNN_NOISE_TENSOR : seed % 2 ? PNN_NOISE_UNIFORM : PNN_NOISE_NONE;
          c.shared = c.noise == PNN_NOISE_UNIFORM;
          c.activation = seed % 4 ? PNN_ACTIVATION_RELU : PNN_ACTIVATION_HARDTANH;
          c.gradients = kGradInput | kGradWeight | kGradBias, c.seed = seed;
          c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = layout;
          run(c);
        }
      }
    }
  }
}

TEST_P(ExactTypes, LopsidedLayers) {
  // So many maps beside few outputs that a range of pixels is narrower than a panel, down to one pixel; so many outputs
  // beside few maps that they are taken in blocks.
  struct Size {
    int64_t C, T, M, groups;
  };
  uint64_t seed = 290;
  for (const Size &size : {Size{5000, 1, 1, 1}, Size{40000, 1, 1, 1}, Size{2050, 2, 1, 2}, Size{700, 3, 4, 1},
                           Size{3, 1100, 1, 1}, Size{2, 2101, 3, 1}, Size{2, 2100, 1, 2}}) {
    for (LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kChannelsLast}) {
      Case c = base();
      c.C = size.C, c.T = size.T, c.M = size.M, c.groups = size.groups, c.B = 2, c.H = 3, c.W = size.C > 9999 ? 3 : 11;
      c.noise = PNN_NOISE_TENSOR, c.seed = seed++;
      if (layout == LayoutKind::kChannelsLast) c.gradients = kAllGradients & ~kGradMask;
      c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = layout;
      run(c);
    }
  }
}

TEST_P(ExactTypes, ManyMaps) {
  // Sums longer than any block of maps.
  for (int64_t M : {1, 3, 64}) {
    Case c = base();
    c.C = M == 1 ? 700 : 17, c.M = M, c.T = 9, c.H = 2, c.W = 9, c.noise = PNN_NOISE_TENSOR, c.seed = 7;
    run(c);
  }
}

TEST_P(ExactTypes, ManySamples) {
  // Sums over pixels longer than any block of pixels, in one image and in many.
  Case c = base();
  c.C = 2, c.T = 3, c.H = 67, c.W = 61, c.noise = PNN_NOISE_TENSOR;
  run(c);
  c.B = 37, c.H = 11, c.W = 10;
  run(c);
  c.B = 1031, c.H = 1, c.W = 3;
  run(c);
}

TEST_P(ExactTypes, Layouts) {
  uint64_t seed = 300;
  int64_t cases = 0;
  LayoutKind Case::*const inputs[] = {&Case::input_layout, &Case::weight_layout, &Case::mask_layout,
                                      &Case::vector_layout, &Case::grad_output_layout};
  LayoutKind Case::*const outputs[] = {&Case::output_layout, &Case::grad_input_layout, &Case::grad_weight_layout,
                                       &Case::grad_mask_layout};
  for (int stride = 1; stride <= 2; stride++) {
    Case c = base();
    c.B = 2, c.C = 6, c.H = 5, c.W = 19, c.T = 4, c.M = 2, c.groups = 2, c.noise = PNN_NOISE_TENSOR;
    c.stride_h = stride, c.stride_w = stride;
    for (LayoutKind Case::*field : inputs) {
      for (LayoutKind kind : input_layouts()) {
        Case d = c;
        d.*field = kind, d.seed = seed++, d.norm = field == &Case::vector_layout;
        run(d);
        cases++;
      }
    }
    for (LayoutKind Case::*field : outputs) {
      for (LayoutKind kind : output_layouts()) {
        Case d = c;
        d.*field = kind, d.seed = seed++;
        run(d);
        cases++;
      }
    }
    // Channels last throughout.
    Case d = c;
    d.input_layout = d.output_layout = d.grad_output_layout = d.grad_input_layout = d.mask_layout = d.grad_mask_layout =
        LayoutKind::kChannelsLast;
    run(d);
    cases++;
  }
  EXPECT_EQ(cases, 2 * (5 * 7 + 4 * 6 + 1));
}

TEST_P(ExactTypes, Pages) {
  // Every tensor, and the workspace, touches an unreadable page.
  uint64_t seed = 400;
  for (Placement placement : {Placement::kEndsAtPage, Placement::kBeginsAtPage, Placement::kHeap}) {
    for (LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kChannelsLast, LayoutKind::kNegative}) {
      for (int64_t width : {1, 3, 7, 16, 21, 67}) {
        Case c = base();
        c.B = 2, c.C = 5, c.H = 3, c.W = width, c.T = 7, c.M = 3, c.noise = PNN_NOISE_TENSOR;
        c.placement = placement, c.poison = Poison::kLarge, c.seed = seed++;
        c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = c.mask_layout = layout;
        c.norm = width % 2 == 0;
        run(c);
      }
    }
  }
}

TEST_P(ExactTypes, MasksOfEveryKind) {
  uint64_t seed = 500;
  for (pnn_noise noise : {PNN_NOISE_NONE, PNN_NOISE_TENSOR, PNN_NOISE_UNIFORM, PNN_NOISE_WAVES}) {
    for (bool shared : {false, true}) {
      for (bool input_mask : {false, true}) {
        for (int64_t M : {1, 2, 15, 16, 17, 33}) {
          for (double level : {1.0, 0.5, -2.0, 0.0}) {
            Case c = base();
            set_types(c, type_pairs()[static_cast<size_t>(GetParam())], input_mask);
            c.B = 2, c.C = 3, c.H = 4, c.W = 9, c.T = 3, c.M = M, c.noise = noise, c.shared = shared, c.level = level;
            c.seed = seed++;
            if (noise == PNN_NOISE_NONE && shared) continue;
            check_exact(c, 0);
          }
        }
      }
    }
  }
}

TEST_P(ExactTypes, Strides) {
  uint64_t seed = 600;
  for (int64_t sh : {1, 2, 3, 7}) {
    for (int64_t sw : {1, 2, 3, 40}) {
      for (int64_t height : {1, 6, 7, 8}) {
        Case c = base();
        c.B = 2, c.C = 4, c.H = height, c.W = 39, c.T = 5, c.M = 2, c.stride_h = sh, c.stride_w = sw, c.seed = seed++;
        c.noise = height % 2 ? PNN_NOISE_UNIFORM : PNN_NOISE_TENSOR;
        run(c);
      }
    }
  }
  // Strides as large as can be.
  Case c = base();
  c.B = 2, c.C = 2, c.H = 3, c.W = 3, c.T = 2;
  c.stride_h = c.stride_w = std::numeric_limits<int64_t>::max();
  run(c);
}

TEST_P(ExactTypes, Groups) {
  uint64_t seed = 700;
  for (int64_t groups : {1, 2, 3, 4, 6, 12}) {
    for (int64_t M : {1, 3}) {
      for (bool norm : {false, true}) {
        Case c = base();
        c.B = 2, c.C = 12, c.H = 3, c.W = 11, c.T = 24, c.M = M, c.groups = groups, c.seed = seed++, c.norm = norm;
        c.noise = PNN_NOISE_TENSOR;
        run(c);
      }
    }
  }
}

TEST_P(ExactTypes, Activations) {
  uint64_t seed = 800;
  for (pnn_activation f : {PNN_ACTIVATION_IDENTITY, PNN_ACTIVATION_RELU, PNN_ACTIVATION_HARDTANH}) {
    for (bool norm : {false, true}) {
      Case c = base();
      c.B = 2, c.C = 5, c.H = 5, c.W = 13, c.T = 6, c.M = 2, c.noise = PNN_NOISE_TENSOR, c.activation = f;
      c.norm = norm, c.seed = seed++;
      run(c);
    }
  }
}

// With one map per group, a weight of a power of two and no bias, each output is one product: nothing is summed, so
// the per-element arithmetic shows its own bits, whatever the level, the mask and the activation's slope.
TEST_P(ExactTypes, ElementsAreRoundedAsDefined) {
  uint64_t seed = 900;
  for (pnn_noise noise : {PNN_NOISE_NONE, PNN_NOISE_TENSOR, PNN_NOISE_UNIFORM, PNN_NOISE_NORMAL, PNN_NOISE_WAVES}) {
    for (pnn_activation f : {PNN_ACTIVATION_IDENTITY, PNN_ACTIVATION_LEAKY_RELU, PNN_ACTIVATION_RELU}) {
      for (double level : {0.1, 1.0, -3.3, 1e-5}) {
        Case c = base();
        c.B = 2, c.C = 5, c.T = 5, c.groups = 5, c.H = 9, c.W = 17, c.noise = noise, c.activation = f, c.level = level;
        c.bias = false, c.fill = Fill::kRandom, c.seed = seed++;
        SCOPED_TRACE(c.describe());
        Problem problem(c);
        problem.weight.fill([i = 0]() mutable { return i++ % 2 ? -2.0 : 0.5; });
        ASSERT_EQ(problem.forward(), PNN_OK) << problem.error.message;
        ASSERT_EQ(problem.backward(), PNN_OK) << problem.error.message;
        const ReferenceInput in = problem.reference_input();
        Reference<double> reference(in);
        ReferenceOutput<double> out;
        reference.forward(out);
        expect_exact(problem.output, out.output, "output");
      }
    }
  }
}

TEST_P(ExactTypes, EvaluationWithNormalisation) {
  uint64_t seed = 1000;
  for (int64_t C : {1, 3, 16, 33}) {
    for (int64_t T : {1, 6, 17}) {
      for (bool affine : {false, true}) {
        for (int64_t stride : {1, 2}) {
          Case c = base();
          c.B = 2, c.C = C, c.H = 5, c.W = 15, c.T = T, c.M = 2, c.norm = true, c.affine = affine, c.seed = seed++;
          c.noise = C % 2 ? PNN_NOISE_UNIFORM : PNN_NOISE_TENSOR;
          c.stride_h = c.stride_w = stride;
          if (is_half(c.weight_type)) c.noise = PNN_NOISE_TENSOR;
          run(c);
        }
      }
    }
  }
}

TEST_P(ExactTypes, TrainingWithNormalisation) {
  uint64_t seed = 1100;
  for (int64_t width : {2, 8, 32, 64}) {
    for (int64_t C : {1, 3, 6}) {
      for (int64_t M : {1, 2}) {
        for (bool shared : {false, true}) {
          for (int64_t stride : {1, 2}) {
            Case c = base();
            c.B = 4, c.C = C, c.H = 4 * stride, c.W = width * stride, c.T = 6, c.M = M, c.shared = shared;
            c.groups = C == 6 ? 3 : 1, c.stride_h = c.stride_w = stride;
            c.norm = c.training = true, c.activation = PNN_ACTIVATION_IDENTITY, c.fill = Fill::kUnit, c.seed = seed++;
            c.noise = PNN_NOISE_TENSOR;
            check_exact(c, 0);
          }
        }
      }
    }
  }
}

TEST_P(ExactTypes, EverySubsetOfGradients) {
  for (bool norm : {false, true}) {
    Case c = base();
    c.B = 2, c.C = 3, c.H = 3, c.W = 9, c.T = 4, c.M = 2, c.noise = PNN_NOISE_TENSOR, c.norm = norm;
    for (unsigned subset = 0; subset <= kAllGradients; subset++) {
      if (!norm && subset > 15) break;
      c.gradients = subset;
      run(c);
    }
    if (norm) {
      c.training = true, c.fill = Fill::kUnit, c.activation = PNN_ACTIVATION_IDENTITY, c.W = 8, c.H = 4;
      for (unsigned subset = 0; subset <= kAllGradients; subset++) {
        c.gradients = subset;
        check_exact(c, 0);
      }
    }
  }
}

// Sums over many pixels, where backward keeps several partial sums and reuses their memory, whatever is asked for.
TEST_P(ExactTypes, SubsetsOfGradientsOverManySamples) {
  uint64_t seed = 1200;
  for (int64_t pixels : {1024, 2048}) {
    for (bool even : {false, true}) {
      for (unsigned subset : {63u, 1u, 2u, 4u, 8u, 16u, 32u, 9u, 3u, 62u, 54u, 25u}) {
        Case c = base();
        c.B = 2, c.C = even ? 8 : 3, c.T = even ? 8 : 5, c.H = 4, c.W = pixels / 8, c.M = even ? 1 : 2;
        c.noise = PNN_NOISE_TENSOR, c.norm = c.training = true, c.activation = PNN_ACTIVATION_IDENTITY;
        c.fill = Fill::kUnit, c.gradients = subset, c.seed = seed++;
        check_exact(c, 0);
      }
    }
  }
}

// Sizes of zero: empty batches and images, no output channels, no input channels.
TEST_P(ExactTypes, Empty) {
  int64_t cases = 0;
  for (int zeros = 0; zeros < 32; zeros++) {
    for (bool norm : {false, true}) {
      for (bool training : {false, true}) {
        for (pnn_noise noise : {PNN_NOISE_NONE, PNN_NOISE_TENSOR, PNN_NOISE_UNIFORM}) {
          if (training && !norm) continue;
          Case c = base();
          c.B = zeros & 1 ? 0 : 2, c.C = zeros & 2 ? 0 : 4, c.H = zeros & 4 ? 0 : 4, c.W = zeros & 8 ? 0 : 4;
          c.T = zeros & 16 ? 0 : 2, c.M = 2, c.noise = noise, c.norm = norm, c.training = training;
          c.groups = 2, c.stride_h = 1, c.stride_w = 1;
          c.activation = PNN_ACTIVATION_IDENTITY;
          // Training needs exact moments; recipes do not have them.
          if (training) {
            c.fill = Fill::kUnit;
            if (noise == PNN_NOISE_UNIFORM && zeros == 0) continue;
            if (noise == PNN_NOISE_UNIFORM && c.samples() > 0) continue;
          }
          check_exact(c, 0);
          cases++;
        }
      }
    }
  }
  EXPECT_GT(cases, 200);
}

TEST_P(ExactTypes, RandomCombinations) {
  const int64_t count = scaled(250);
  std::set<int64_t> columns_met;
  std::set<int> layouts_met;
  for (int64_t i = 0; i < count; i++) {
    Random random(static_cast<uint64_t>(GetParam()) * 1000003u + static_cast<uint64_t>(i));
    Case c;
    set_types(c, type_pairs()[static_cast<size_t>(GetParam())], random.flip());
    c.seed = random.bits() >> 1;
    c.M = random.pick(std::vector<int64_t>{1, 1, 1, 2, 3, 16});
    c.C = random.pick(c.M == 16 ? std::vector<int64_t>{1, 4} : std::vector<int64_t>{1, 3, 6, 12, 16, 17, 24});
    c.T = random.pick(std::vector<int64_t>{1, 5, 6, 7, 12, 16, 17, 24, 48});
    c.groups = random_groups(random, c.C, c.T);
    c.B = random.integer(1, 3);
    c.W = random.pick(kColumns);
    c.H = c.W > 200 ? 1 : random.pick(std::vector<int64_t>{1, 2, 3, 8});
    c.stride_h = random.pick(std::vector<int64_t>{1, 1, 2, 3});
    c.stride_w = random.pick(std::vector<int64_t>{1, 1, 2, 3});
    c.noise = random.pick(std::vector<pnn_noise>{PNN_NOISE_NONE, PNN_NOISE_TENSOR, PNN_NOISE_UNIFORM, PNN_NOISE_WAVES});
    c.shared = c.noise != PNN_NOISE_NONE && random.flip();
    c.level = random.pick(std::vector<double>{1, 0.5, 0.25});
    c.activation =
        random.pick(std::vector<pnn_activation>{PNN_ACTIVATION_IDENTITY, PNN_ACTIVATION_RELU, PNN_ACTIVATION_HARDTANH});
    c.bias = random.flip();
    c.norm = random.integer(0, 3) == 0;
    if (c.norm && is_half(c.weight_type) && c.noise >= PNN_NOISE_UNIFORM) c.noise = PNN_NOISE_TENSOR;
    c.affine = random.flip();
    c.gradients = static_cast<unsigned>(random.integer(0, 63));
    c.input_layout = random.pick(input_layouts());
    c.weight_layout = random.pick(input_layouts());
    c.mask_layout = random.pick(input_layouts());
    c.vector_layout = random.pick(input_layouts());
    c.grad_output_layout = random.pick(input_layouts());
    c.output_layout = random.pick(output_layouts());
    c.grad_input_layout = random.pick(output_layouts());
    c.grad_weight_layout = random.pick(output_layouts());
    c.grad_mask_layout = random.pick(output_layouts());
    if (random.integer(0, 2) == 0) {
      c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = LayoutKind::kChannelsLast;
    }
    c.placement = random.pick(
        std::vector<Placement>{Placement::kZones, Placement::kEndsAtPage, Placement::kBeginsAtPage, Placement::kHeap});
    c.poison = random.flip() ? Poison::kNan : Poison::kLarge;
    check_exact(c, 0);
    columns_met.insert(c.W);
    layouts_met.insert(static_cast<int>(c.input_layout));
    if (HasFailure()) break;
  }
  if (count >= 250) {
    EXPECT_EQ(columns_met.size(), kColumns.size());
    EXPECT_EQ(layouts_met.size(), input_layouts().size());
  }
}

}  // namespace
}  // namespace pnn_test
