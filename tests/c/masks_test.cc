// masks_test.cc - masks by recipe: the generator's published answers, the kinds, frozen values, and what a seed
// promises.
#include <gtest/gtest.h>

#include <set>

#include "case.h"

#if __has_include(<Random123/philox.h>)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wexpansion-to-defined"
#include <Random123/philox.h>
#pragma GCC diagnostic pop
#define PNN_HAVE_RANDOM123 1
#else
#define PNN_HAVE_RANDOM123 0
#endif

namespace pnn_test {
namespace {

const std::vector<pnn_noise> kRecipes = {PNN_NOISE_UNIFORM, PNN_NOISE_NORMAL, PNN_NOISE_WAVES};

struct MaskCase {
  pnn_dtype type = PNN_FLOAT32;
  int64_t C = 1, M = 1, H = 1, W = 1;
  pnn_noise noise = PNN_NOISE_UNIFORM;
  bool shared = false;
  int64_t seed = 0;
  LayoutKind layout = LayoutKind::kContiguous;
  Placement placement = Placement::kZones;
};

Tensor fill_mask(const MaskCase &c, const pnn_host *host = nullptr) {
  Random random(static_cast<uint64_t>(c.W * 31 + c.M));
  Tensor tensor(c.type, {c.shared ? 1 : c.C, c.M, c.H, c.W}, c.layout, random, c.placement, Poison::kNan, c.W % 16);
  pnn_error error = {};
  const pnn_status status = pnn_mask_fill(&tensor.view(), c.noise, c.shared, &c.seed, host, &error);
  EXPECT_EQ(status, PNN_OK) << error.message;
  EXPECT_TRUE(tensor.intact_outside());
  return tensor;
}

void expect_formula(const MaskCase &c, const Tensor &mask) {
  int64_t index = 0;
  int64_t wrong = 0;
  for (int64_t channel = 0; channel < (c.shared ? 1 : c.C); channel++) {
    for (int64_t m = 0; m < c.M; m++) {
      for (int64_t i = 0; i < c.H; i++) {
        for (int64_t j = 0; j < c.W; j++, index++) {
          const int64_t k = c.shared ? m : channel * c.M + m;
          const double want = round_to(c.type, recipe_value(c.noise, static_cast<uint64_t>(c.seed), k, i, j));
          if (!same_value(mask.value(index), want) && wrong++ < 3) {
            ADD_FAILURE() << name_of(c.noise) << " " << name_of(c.type) << " C" << c.C << " M" << c.M << " H" << c.H
                          << " W" << c.W << " seed " << c.seed << ": [" << channel << "][" << m << "][" << i << "]["
                          << j << "] is " << mask.value(index) << ", should be " << want;
          }
        }
      }
    }
  }
}

// Counters and keys with their published outputs: Random123's kat_vectors, Salmon et al.
TEST(Masks, ReferenceGeneratorKnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffffu),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822u),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// The library's own generator, byte by byte: the uniform mask at row 0, column 0 is the known answer of counter 0.
TEST(Masks, KnownAnswerThroughTheLibrary) {
  MaskCase c;
  c.C = 16;
  const Tensor mask = fill_mask(c);
  const std::array<uint32_t, 4> words = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int k = 0; k < 16; k++) {
    EXPECT_EQ(mask.value(k),
              (2.0 * static_cast<double>((words[static_cast<size_t>(k / 4)] >> (8 * (k % 4))) & 255) - 255) / 256);
  }
}

#if PNN_HAVE_RANDOM123
// Random123 is the authors' own implementation: an oracle that shares nothing with ours.
TEST(Masks, Random123Agrees) {
  Random random(5);
  for (int i = 0; i < 2000; i++) {
    philox4x32_ctr_t counter;
    philox4x32_key_t key;
    for (uint32_t &v : counter.v) v = static_cast<uint32_t>(random.bits());
    for (uint32_t &v : key.v) v = static_cast<uint32_t>(random.bits());
    const philox4x32_ctr_t out = philox4x32(counter, key);
    const std::array<uint32_t, 4> ours = philox({counter.v[0], counter.v[1], counter.v[2], counter.v[3]},
                                                key.v[0] | static_cast<uint64_t>(key.v[1]) << 32);
    for (size_t w = 0; w < 4; w++) ASSERT_EQ(out.v[w], ours[w]);
  }
  // And the library's uniform masks directly.
  for (int64_t seed : {int64_t{0}, int64_t{1}, int64_t{-1}, int64_t{0x299f31d0a4093822}}) {
    MaskCase c;
    c.C = 40, c.H = 3, c.W = 37, c.seed = seed;
    const Tensor mask = fill_mask(c);
    for (int64_t k = 0; k < 40; k++) {
      for (uint32_t i = 0; i < 3; i++) {
        for (uint32_t j = 0; j < 37; j++) {
          const philox4x32_ctr_t counter = {{j, i, static_cast<uint32_t>(k / 16), 0}};
          const philox4x32_key_t key = {
              {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)}};
          const philox4x32_ctr_t out = philox4x32(counter, key);
          const int u = static_cast<int>((out.v[k % 16 / 4] >> (8 * (k % 4))) & 255);
          ASSERT_EQ(mask.value((k * 3 + i) * 37 + j), (2.0 * u - 255) / 256);
        }
      }
    }
  }
}
#endif

// Values that may never change: a saved seed must give the same masks in every later version. k 0 to 3, rows 0 to 1,
// columns 0 to 2 of seed 42, times 256 (normal: the float's bits).
TEST(Masks, FrozenValues) {
  MaskCase c;
  c.C = 2, c.M = 2, c.H = 2, c.W = 3, c.seed = 42;
  const std::vector<double> uniform = {-89, -177, -181, 103, 81,   17,  225, -189, -251, 113,  7,    -121,
                                       213, 183,  -39,  193, -249, 113, 57,  249,  167,  -123, -187, -229};
  const std::vector<double> waves = {81,  131, 183, -63, -13, 39,  -103, -191, -235, -67, -155, -241,
                                     111, 199, -5,  -35, 169, 139, 93,   201,  205,  -25, 81,   189};
  const std::vector<uint64_t> normal = {0x3f63cde6, 0x3f5654fd, 0x3f9e9b0d, 0x3f578e87, 0xbe908560, 0xbd305d57,
                                        0xbf6d9a31, 0x3f2dea44, 0x3f84e2c6, 0x3c1cc4bf, 0xbcc3f5ef, 0x3feb271e,
                                        0x3f87f29e, 0x3f91beea, 0x3fc3f5ef, 0x3fa1aae5, 0xbe578e87, 0x3fcb4f28,
                                        0x3e9cc4bf, 0xbf7c4ca3, 0xbf813629, 0xbf3c9cb6, 0x3f84e2c6, 0x3fc705c6};
  const Tensor u = fill_mask(c);
  c.noise = PNN_NOISE_WAVES;
  const Tensor w = fill_mask(c);
  c.noise = PNN_NOISE_NORMAL;
  const Tensor n = fill_mask(c);
  ASSERT_EQ(u.count(), 24);
  for (int64_t i = 0; i < 24; i++) {
    const size_t s = static_cast<size_t>(i);
    EXPECT_EQ(u.value(i) * 256, uniform[s]);
    EXPECT_EQ(w.value(i) * 256, waves[s]);
    EXPECT_EQ(n.bits()[s], normal[s]);
  }
}

TEST(Masks, EveryKindEqualsItsFormula) {
  for (pnn_noise noise : kRecipes) {
    for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16}) {
      for (bool shared : {false, true}) {
        for (int64_t M : {1, 2, 3, 15, 16, 17, 33}) {
          for (int64_t width : {1, 3, 7, 8, 15, 16, 17, 63, 64, 65, 130}) {
            MaskCase c;
            c.type = type, c.C = shared ? 1 : 3, c.M = M, c.H = width > 60 ? 1 : 3, c.W = width, c.noise = noise;
            c.shared = shared, c.seed = -M * 1234567890123 + width;
            c.placement = width % 2 ? Placement::kEndsAtPage : Placement::kZones;
            expect_formula(c, fill_mask(c));
          }
        }
      }
    }
  }
}

TEST(Masks, EveryLayout) {
  for (pnn_noise noise : kRecipes) {
    for (LayoutKind layout : output_layouts()) {
      for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16}) {
        MaskCase c;
        c.type = type, c.C = 5, c.M = 7, c.H = 5, c.W = 19, c.noise = noise, c.layout = layout, c.seed = 11;
        expect_formula(c, fill_mask(c));
      }
    }
  }
}

TEST(Masks, SeedsAtTheEnds) {
  for (pnn_noise noise : kRecipes) {
    for (int64_t seed : {int64_t{0}, int64_t{1}, int64_t{-1}, std::numeric_limits<int64_t>::max(),
                         std::numeric_limits<int64_t>::min(), int64_t{1} << 32}) {
      MaskCase c;
      c.C = 3, c.H = 3, c.W = 20, c.noise = noise, c.seed = seed;
      expect_formula(c, fill_mask(c));
    }
  }
}

// "A mask for a larger image continues the smaller one's."
TEST(Masks, LargerImagesContinueSmallerOnes) {
  for (pnn_noise noise : kRecipes) {
    MaskCase small;
    small.C = 2, small.M = 3, small.H = 5, small.W = 11, small.noise = noise, small.seed = 99;
    MaskCase large = small;
    large.H = 9, large.W = 150;
    const Tensor a = fill_mask(small);
    const Tensor b = fill_mask(large);
    for (int64_t k = 0; k < 6; k++) {
      for (int64_t i = 0; i < small.H; i++) {
        for (int64_t j = 0; j < small.W; j++) {
          ASSERT_EQ(a.value((k * small.H + i) * small.W + j), b.value((k * large.H + i) * large.W + j));
        }
      }
    }
  }
}

// Images larger than 65536 along an axis: coordinates are 32-bit words of the counter.
TEST(Masks, LongRows) {
  for (pnn_noise noise : kRecipes) {
    MaskCase c;
    c.W = 70001, c.noise = noise, c.seed = 3;
    expect_formula(c, fill_mask(c));
    c.W = 1, c.H = 70001;
    expect_formula(c, fill_mask(c));
  }
}

TEST(Masks, ThreadsDoNotMatter) {
  for (pnn_noise noise : kRecipes) {
    MaskCase c;
    c.C = 20, c.M = 3, c.H = 17, c.W = 33, c.noise = noise, c.seed = 7;
    const std::vector<uint64_t> serial = fill_mask(c).bits();
    for (int32_t threads : {1, 2, 3, 7}) {
      for (TaskOrder order : {TaskOrder::kReversed, TaskOrder::kShuffled}) {
        ThreadHost host(threads, order);
        EXPECT_EQ(fill_mask(c, host.get()).bits(), serial);
      }
    }
  }
}

TEST(Masks, EmptySizes) {
  for (pnn_noise noise : kRecipes) {
    for (int zeros = 1; zeros < 16; zeros++) {
      MaskCase c;
      c.C = zeros & 1 ? 0 : 2, c.M = zeros & 2 ? 0 : 2, c.H = zeros & 4 ? 0 : 2, c.W = zeros & 8 ? 0 : 2;
      c.noise = noise;
      EXPECT_EQ(fill_mask(c).count(), 0);
    }
  }
}

// The first two moments: of a quarter of a million values, within five standard errors.
TEST(Masks, Moments) {
  for (pnn_noise noise : kRecipes) {
    MaskCase c;
    c.C = 64, c.H = 64, c.W = 64, c.noise = noise, c.seed = 2018;
    const Tensor mask = fill_mask(c);
    double sum = 0;
    double squares = 0;
    double largest = 0;
    std::set<double> distinct;
    for (double v : mask.values()) {
      sum += v;
      squares += v * v;
      largest = std::max(largest, std::fabs(v));
      distinct.insert(v);
    }
    const double n = static_cast<double>(mask.count());
    const double deviation = noise == PNN_NOISE_NORMAL ? 1.0 : std::sqrt((1.0 - 1.0 / 65536) / 3);
    // Waves are smooth: their maps, not their pixels, are what is independent.
    const double standard_error = deviation / std::sqrt(noise == PNN_NOISE_WAVES ? 64.0 : n);
    EXPECT_NEAR(sum / n, 0, 5 * standard_error) << name_of(noise);
    EXPECT_NEAR(squares / n, deviation * deviation, 5 * standard_error) << name_of(noise);
    EXPECT_LT(largest, noise == PNN_NOISE_NORMAL ? 4.89 : 1.0);
    if (noise == PNN_NOISE_NORMAL) {
      EXPECT_GT(distinct.size(), 500u);
    } else {
      EXPECT_EQ(distinct.size(), 256u) << name_of(noise);
    }
  }
}

// Neighbouring maps, rows and columns of the noise are uncorrelated.
TEST(Masks, Correlations) {
  for (pnn_noise noise : {PNN_NOISE_UNIFORM, PNN_NOISE_NORMAL}) {
    MaskCase c;
    c.C = 32, c.H = 64, c.W = 64, c.noise = noise, c.seed = 1806;
    const std::vector<double> v = fill_mask(c).values();
    const double variance = noise == PNN_NOISE_NORMAL ? 1.0 : 1.0 / 3;
    for (size_t lag : {size_t{1}, size_t{64}, size_t{64 * 64}, size_t{16 * 64 * 64}}) {
      double sum = 0;
      for (size_t i = 0; i + lag < v.size(); i++) sum += v[i] * v[i + lag];
      const double n = static_cast<double>(v.size() - lag);
      EXPECT_NEAR(sum / n / variance, 0, 5 / std::sqrt(n)) << name_of(noise) << " lag " << lag;
    }
  }
}

// The layer with a recipe computes the bits of the layer with the written-out mask, forward and backward.
TEST(Masks, RecipeEqualsTensor) {
  int64_t cases = 0;
  for (const TypePair pair : type_pairs()) {
    for (pnn_noise noise : kRecipes) {
      for (bool shared : {false, true}) {
        for (int64_t M : {1, 3, 16}) {
          for (int64_t stride : {1, 2}) {
            for (bool norm : {false, true}) {
              Case c;
              set_types(c, pair);
              c.B = 3, c.C = 4, c.H = 5, c.W = 21, c.T = 6, c.M = M, c.groups = 2, c.shared = shared, c.noise = noise;
              c.stride_h = c.stride_w = stride, c.fill = Fill::kRandom, c.level = 0.3, c.norm = c.training = norm;
              c.eps = 1e-5, c.gradients = kAllGradients & ~static_cast<unsigned>(kGradMask), c.seed = 12;
              SCOPED_TRACE(c.describe());
              Problem recipe(c);
              Case d = c;
              d.noise = PNN_NOISE_TENSOR;
              Problem tensor(d);
              recipe.input.fill([i = 0]() mutable { return std::sin(++i); });
              tensor.input.fill([i = 0]() mutable { return std::sin(++i); });
              for (auto member : {&Problem::weight, &Problem::bias, &Problem::grad_output, &Problem::norm_weight,
                                  &Problem::norm_bias}) {
                int64_t i = 0;
                (tensor.*member).fill([&] { return (recipe.*member).value(i++); });
              }
              const int64_t seed = static_cast<int64_t>(recipe.mask_seed());
              ASSERT_EQ(pnn_mask_fill(&tensor.mask.view(), noise, shared, &seed, nullptr, nullptr), PNN_OK);
              tensor.mask.seal();
              ASSERT_EQ(recipe.forward(), PNN_OK);
              ASSERT_EQ(tensor.forward(), PNN_OK);
              ASSERT_EQ(recipe.backward(), PNN_OK);
              ASSERT_EQ(tensor.backward(), PNN_OK);
              EXPECT_EQ(recipe.result_bits(), tensor.result_bits());
              cases++;
            }
          }
        }
      }
    }
  }
  EXPECT_EQ(cases, static_cast<int64_t>(type_pairs().size()) * 3 * 2 * 3 * 2 * 2);
}

// At level 0 a finite mask changes nothing: the bits are those of no perturbation.
TEST(Masks, LevelZeroIsTheControl) {
  for (pnn_noise noise : {PNN_NOISE_TENSOR, PNN_NOISE_UNIFORM, PNN_NOISE_NORMAL, PNN_NOISE_WAVES}) {
    Case c;
    c.B = 2, c.C = 5, c.H = 6, c.W = 7, c.T = 4, c.fill = Fill::kRandom, c.noise = noise, c.level = 0;
    c.gradients = kGradInput | kGradWeight | kGradBias;
    Problem with(c);
    c.noise = PNN_NOISE_NONE;
    Problem without(c);
    for (auto member : {&Problem::input, &Problem::weight, &Problem::bias, &Problem::grad_output}) {
      int64_t i = 0;
      (without.*member).fill([&] { return (with.*member).value(i++); });
    }
    for (Problem *p : {&with, &without}) {
      ASSERT_EQ(p->forward(), PNN_OK);
      ASSERT_EQ(p->backward(), PNN_OK);
    }
    EXPECT_EQ(with.result_bits(), without.result_bits());
  }
}

}  // namespace
}  // namespace pnn_test
