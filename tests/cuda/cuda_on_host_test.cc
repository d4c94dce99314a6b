/*
 * cuda_on_host_test.cc - the header that runs kernels on the CPU must catch what a GPU would punish: planted bugs, each
 * beside the correct kernel, and the tensor core's arithmetic against sums worked out by hand.
 */
#include <gtest/gtest.h>

#include <vector>

#include "ptx.h"

namespace {

using cuda_on_host::Order;
using cuda_on_host::TensorCore;
namespace host = cuda_on_host;
using namespace pnn_cuda;

struct Run {
  Order order;
  bool lazy;
};
const Run runs[] = {{Order::ROUND_ROBIN, false}, {Order::ROUND_ROBIN, true}, {Order::REVERSE, false},
                    {Order::REVERSE, true},      {Order::SHUFFLED, false},   {Order::SHUFFLED, true},
                    {Order::GREEDY, false},      {Order::GREEDY, true}};

/* Runs the function under every schedule; the results, one each. */
template <class Function>
std::vector<std::vector<float>> under_all(Function function) {
  std::vector<std::vector<float>> results;
  for (const Run &run : runs)
    for (unsigned seed = 1; seed <= 3; seed++) {
      host::options = {};
      host::options.order = run.order;
      host::options.lazy_copies = run.lazy;
      host::options.seed = seed;
      results.push_back(function());
    }
  host::options = {};
  return results;
}

int disagreements(const std::vector<std::vector<float>> &results) {
  int count = 0;
  for (const std::vector<float> &result : results)
    count += memcmp(result.data(), results[0].data(), result.size() * sizeof(float)) != 0;
  return count;
}

enum class Bug {
  NONE,
  NO_FIRST_BARRIER,
  NO_SECOND_BARRIER,
  NO_WAIT,
  WAIT_FOR_TOO_FEW,
  OVER_READ,
  COPY_OVER_READ,
  DIVERGENT_BARRIER
};

/* Each thread's sum of its neighbour's words, through shared memory, four words to a copy, round after round. */
__global__ void neighbours(const float *x, float *y, int rounds, Bug bug) {
  PNN_SHARED_MEMORY(memory);
  float *tile = reinterpret_cast<float *>(memory);
  const int threads = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < rounds; round++) {
    copy_async16(tile + i * 4, x + (round * threads + i + (bug == Bug::COPY_OVER_READ ? 1 : 0)) * 4, 16);
    copy_commit();
    if (bug == Bug::WAIT_FOR_TOO_FEW)
      copy_wait<1>();
    else if (bug != Bug::NO_WAIT)
      copy_wait<0>();
    if (bug != Bug::NO_FIRST_BARRIER && !(bug == Bug::DIVERGENT_BARRIER && i == 5)) __syncthreads();
    const int from = (i + 33) % threads * 4;
    for (int e = 0; e < (bug == Bug::OVER_READ ? 5 : 4); e++) sum = fma_(sum, 0.5f, tile[from + e]);
    if (bug != Bug::NO_SECOND_BARRIER) __syncthreads();
  }
  y[i] = sum;
}

std::vector<float> run_neighbours(Bug bug) {
  const int threads = 128, rounds = 4;
  std::vector<float> x(threads * rounds * 4), y(threads);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i % 251);
  host::launch(neighbours, dim3(1), dim3(threads), threads * 16, x.data(), y.data(), rounds, bug);
  return y;
}

TEST(CudaOnHost, CorrectKernelGivesOneResultUnderEverySchedule) {
  const auto results = under_all([] { return run_neighbours(Bug::NONE); });
  EXPECT_EQ(disagreements(results), 0);
  float expected = 0; /* thread 0 reads the words of thread 33 */
  for (int round = 0; round < 4; round++)
    for (int e = 0; e < 4; e++) expected = expected * 0.5f + static_cast<float>((round * 512 + 33 * 4 + e) % 251);
  EXPECT_EQ(results[0][0], expected);
}

TEST(CudaOnHost, MissingBarriersAreSeen) {
  EXPECT_GT(disagreements(under_all([] { return run_neighbours(Bug::NO_FIRST_BARRIER); })), 0);
  EXPECT_GT(disagreements(under_all([] { return run_neighbours(Bug::NO_SECOND_BARRIER); })), 0);
}

TEST(CudaOnHost, MissingWaitReadsPoisonWhereCopiesAreLazy) {
  for (Bug bug : {Bug::NO_WAIT, Bug::WAIT_FOR_TOO_FEW}) {
    host::options = {};
    host::options.lazy_copies = true;
    EXPECT_TRUE(std::isnan(run_neighbours(bug)[0]));
    host::options.lazy_copies = false;
    EXPECT_FALSE(std::isnan(run_neighbours(bug)[0]));
  }
  host::options = {};
}

TEST(CudaOnHostDeathTest, DivergentBarrierIsReported) {
  EXPECT_DEATH(run_neighbours(Bug::DIVERGENT_BARRIER), "divergent barrier");
}

TEST(CudaOnHostDeathTest, OverReadIsTheAddressSanitizers) {
#if defined(PNN_HOST_ASAN)
  for (bool lazy : {false, true}) {
    host::options.lazy_copies = lazy;
    EXPECT_DEATH(run_neighbours(Bug::OVER_READ), "heap-buffer-overflow");      /* of shared memory */
    EXPECT_DEATH(run_neighbours(Bug::COPY_OVER_READ), "heap-buffer-overflow"); /* of global memory, by cp.async */
  }
  host::options = {};
#else
  GTEST_SKIP() << "needs the address sanitizer";
#endif
}

__global__ void masked_barrier(bool wrong) { __syncwarp(wrong && threadIdx.x == 3 ? 0x0fu : 0xffffffffu); }

TEST(CudaOnHostDeathTest, WarpBarrierMasksMustAgree) {
  host::launch(masked_barrier, dim3(1), dim3(32), 0, false);
  EXPECT_DEATH(host::launch(masked_barrier, dim3(1), dim3(32), 0, true), "different masks");
}

__global__ void misaligned_copy(const float *x) {
  PNN_SHARED_MEMORY(memory);
  copy_async16(memory, x + 1, 16);
}

__global__ void misaligned_matrix(uint32_t *) {
  PNN_SHARED_MEMORY(memory);
  uint32_t r[4];
  load_matrices(r, memory + threadIdx.x * 4);
}

TEST(CudaOnHostDeathTest, MisalignedAccessIsReported) {
  alignas(16) static const float x[8] = {};
  EXPECT_DEATH(host::launch(misaligned_copy, dim3(1), dim3(1), 16, &x[0]), "misaligned");
  EXPECT_DEATH(host::launch(misaligned_matrix, dim3(1), dim3(32), 1024, static_cast<uint32_t *>(nullptr)), "aligned");
}

__global__ void partial_copy(const float *x, float *y) {
  PNN_SHARED_MEMORY(memory);
  copy_async16(memory, x, static_cast<int>(blockIdx.x) * 4);
  copy_commit();
  copy_wait<0>();
  for (int e = 0; e < 4; e++) y[blockIdx.x * 4 + static_cast<unsigned>(e)] = reinterpret_cast<float *>(memory)[e];
}

TEST(CudaOnHost, CopiesFillTheirRestWithZeros) {
  alignas(16) const float x[4] = {1, 2, 3, 4};
  float y[20];
  host::launch(partial_copy, dim3(5), dim3(1), 16, &x[0], &y[0]);
  for (int valid = 0; valid < 5; valid++)
    for (int e = 0; e < 4; e++) EXPECT_EQ(y[valid * 4 + e], e < valid ? x[e] : 0.0f);
}

__global__ void shuffle(float *y) {
  const int i = static_cast<int>(threadIdx.x);
  float value = static_cast<float>(i);
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  y[i] = value;
}

__global__ void early_end() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void deadlock() {
  if (threadIdx.x == 40) __syncwarp();
  __syncthreads();
}

TEST(CudaOnHostDeathTest, EarlyEndIsReported) {
  EXPECT_DEATH(host::launch(early_end, dim3(1), dim3(64), 0), "divergent barrier");
}

TEST(CudaOnHostDeathTest, DeadlockIsReported) {
  EXPECT_DEATH(host::launch(deadlock, dim3(1), dim3(64), 0),
               "deadlock in block \\(0,0,0\\): 63 threads at __syncthreads, 1");
}

TEST(CudaOnHost, ShufflesAddUpAWarp) {
  float y[64];
  host::launch(shuffle, dim3(1), dim3(64), 0, &y[0]);
  for (int i = 0; i < 64; i++) EXPECT_EQ(y[i], i < 32 ? 496.0f : 496.0f + 1024.0f);
}

/* c = a * b with a [16][16], b [8][16] (a column each), through ldmatrix. */
template <class T>
__global__ void one_product(const uint16_t *a, const uint16_t *b, float *c, bool transposed) {
  PNN_SHARED_MEMORY(memory);
  uint16_t *sa = reinterpret_cast<uint16_t *>(memory), *sb = sa + 256;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) sa[transposed ? i % 16 * 16 + i / 16 : i] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i] = b[i];
  for (int i = lane; i < 128; i += 32) sb[128 + i] = 0;
  __syncthreads();
  uint32_t x[4], y[4];
  if (transposed)
    load_matrices_transposed(x, sa + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  else
    load_matrices(x, sa + lane % 16 * 16 + lane / 16 * 8);
  load_matrices(y, sb + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  float sum[4] = {c[0], c[0], c[0], c[0]};
  multiply(T{}, sum, x, y);
  __syncthreads();
  for (int e = 0; e < 4; e++) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
}

template <class T>
std::vector<float> run_product(const std::vector<float> &a, const std::vector<float> &b, float start, bool transposed) {
  std::vector<uint16_t> x, y;
  for (float v : a) x.push_back(round_to(T{}, v).bits);
  for (float v : b) y.push_back(round_to(T{}, v).bits);
  std::vector<float> c(128, start);
  host::launch(one_product<T>, dim3(1), dim3(32), 1024, x.data(), y.data(), c.data(), transposed);
  return c;
}

TEST(TensorCore, ExactOnSmallIntegersInEveryLayout) {
  std::vector<float> a(256), b(128);
  for (int i = 0; i < 256; i++) a[static_cast<size_t>(i)] = static_cast<float>(i * 7 % 23 - 11);
  for (int i = 0; i < 128; i++) b[static_cast<size_t>(i)] = static_cast<float>(i * 5 % 19 - 9);
  for (TensorCore core : {TensorCore::AMPERE, TensorCore::HOPPER})
    for (bool transposed : {false, true}) {
      host::options.tensor_core = core;
      const auto c = run_product<bfloat16>(a, b, 3, transposed);
      EXPECT_EQ(c, run_product<float16>(a, b, 3, transposed));
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
          float sum = 3;
          for (int k = 0; k < 16; k++) sum += a[static_cast<size_t>(i * 16 + k)] * b[static_cast<size_t>(j * 16 + k)];
          EXPECT_EQ(c[static_cast<size_t>(i * 8 + j)], sum);
        }
    }
  host::options = {};
}

TEST(TensorCore, TruncatesBelowItsFractionBits) {
  /* 1 + 2^-25 + 2^-25: Hopper keeps both halves of the last bit, 25 fractional bits, and then rounds toward zero;
   * with four of them the sum 2^-23 is kept. Ampere, with 24 bits, drops each. */
  std::vector<float> a(256, 0.0f), b(128, 0.0f);
  for (int k = 0; k < 16; k++) b[static_cast<size_t>(k)] = 1;
  a[0] = 1;
  for (int k = 1; k <= 4; k++) a[static_cast<size_t>(k)] = 0x1p-25f;
  host::options.tensor_core = TensorCore::HOPPER;
  EXPECT_EQ(run_product<bfloat16>(a, b, 0, false)[0], 1 + 0x1p-23f);
  host::options.tensor_core = TensorCore::AMPERE;
  EXPECT_EQ(run_product<bfloat16>(a, b, 0, false)[0], 1.0f);
  /* In the second half of the depth Ampere adds them among themselves first only on top of c = 1. */
  for (int k = 1; k <= 4; k++) a[static_cast<size_t>(k)] = 0;
  for (int k = 8; k < 16; k++) a[static_cast<size_t>(k)] = 0x1p-24f;
  EXPECT_EQ(run_product<bfloat16>(a, b, 0, false)[0], 1 + 0x1p-21f);
  host::options = {};
}

TEST(TensorCore, RoundsTowardZero) {
  std::vector<float> a(256, 0.0f), b(128, 0.0f);
  b[0] = b[1] = 1;
  a[0] = 1;
  a[1] = 0x1.8p-24f; /* three quarters of the last place */
  EXPECT_EQ(run_product<bfloat16>(a, b, 0, false)[0], 1.0f);
  a[0] = -1;
  a[1] = -0x1.8p-24f;
  EXPECT_EQ(run_product<bfloat16>(a, b, 0, false)[0], -1.0f);
}

TEST(TensorCore, InfinityAndNan) {
  std::vector<float> a(256, 1.0f), b(128, 1.0f);
  a[0] = HUGE_VALF;
  EXPECT_EQ(run_product<float16>(a, b, 0, false)[0], HUGE_VALF);
  a[1] = -HUGE_VALF;
  EXPECT_TRUE(std::isnan(run_product<float16>(a, b, 0, false)[0]));
  a[1] = NAN;
  EXPECT_TRUE(std::isnan(run_product<bfloat16>(a, b, 0, false)[0]));
  EXPECT_EQ(run_product<bfloat16>(a, b, 0, false)[8], 16.0f);
}

__global__ void tf32_product(const float *a, const float *b, float *c) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t x[4], y[2];
  for (int e = 0; e < 4; e++) x[e] = to_tf32(a[(lane / 4 + e % 2 * 8) * 8 + lane % 4 + e / 2 * 4]);
  for (int e = 0; e < 2; e++) y[e] = to_tf32(b[lane / 4 * 8 + lane % 4 + e * 4]);
  float sum[4] = {};
  multiply_tf32(sum, x, y);
  for (int e = 0; e < 4; e++) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
}

TEST(TensorCore, Tf32) {
  float a[128], b[64], c[128];
  for (int i = 0; i < 128; i++) a[i] = static_cast<float>(i % 13 - 6) + 0.125f;
  for (int i = 0; i < 64; i++) b[i] = static_cast<float>(i % 7 - 3);
  host::launch(tf32_product, dim3(1), dim3(32), 0, &a[0], &b[0], &c[0]);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      float sum = 0;
      for (int k = 0; k < 8; k++) sum += a[i * 8 + k] * b[j * 8 + k];
      EXPECT_EQ(c[i * 8 + j], sum);
    }
  EXPECT_EQ(float_of(to_tf32(1 + 0x1p-11f)), 1 + 0x1p-10f); /* ties go away from zero */
  EXPECT_EQ(float_of(to_tf32(1 + 0x1.fp-12f)), 1.0f);
  EXPECT_TRUE(std::isinf(float_of(to_tf32(HUGE_VALF))));
  EXPECT_EQ(float_of(to_tf32_even(1 + 0x1p-11f)), 1.0f); /* ... or to the even one */
  EXPECT_EQ(float_of(to_tf32_even(1 + 0x3p-11f)), 1 + 0x1p-9f);
  EXPECT_EQ(float_of(to_tf32_even(-1 - 0x1.08p-11f)), -1 - 0x1p-10f);
  EXPECT_EQ(float_of(to_tf32_even(0x1.fffffep-126f)), 0x1p-125f);
  EXPECT_TRUE(std::isinf(float_of(to_tf32_even(0x1.fffffep127f))));
  EXPECT_TRUE(std::isinf(float_of(to_tf32_even(-HUGE_VALF))));
  EXPECT_TRUE(std::isnan(float_of(to_tf32_even_relu(NAN))));
  EXPECT_EQ(float_of(to_tf32_even_relu(-2)), 0.0f);
  EXPECT_EQ(float_of(to_tf32_even_relu(1 + 0x1p-11f)), 1.0f);
}

/* ---- wgmma ---- */

enum class ProductBug {
  NONE,
  NO_FENCE,                /* of an operand that was written */
  FENCE_BEFORE_WRITE,      /* ... which is as good as none */
  NO_START,                /* sums written, not fenced */
  NO_WAIT,                 /* the sums are read while a product runs */
  SUMS_WRITTEN,            /* ... or written */
  OPERAND_WRITTEN,         /* while the product that reads it runs */
  WAIT_FOR_TOO_FEW,        /* before an operand's registers are used again */
  NO_PROXY_FENCE,          /* between cp.async's write and the product */
  PROXY_FENCE_BEFORE_WAIT, /* ... before it has landed */
  STORED,                  /* B stored by a thread, which is the same */
  SHARED_OVERWRITTEN,      /* while a product reads it */
  SWAPPED_STEPS,           /* of the descriptor */
  SWIZZLED,
  OUTSIDE,
  LANES_DISAGREE,
  END_WHILE_RUNNING
};

/* d[64][64] = 1 + the sum over rounds of a[64][16] * b[16][64], b as core matrices: two of depth beside each other,
 * then the next eight columns. Two operands in turn, so that one is made while the other's product runs. */
__global__ void products(const uint16_t *a, const uint16_t *b, float *d, int rounds, ProductBug bug) {
  PNN_SHARED_MEMORY(memory);
  const int thread = thread_index(), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  float sums[32];
  for (float &sum : sums) sum = 1;
  if (bug != ProductBug::NO_START) products_start(sums);
  uint32_t operand[2][4] = {};
  for (int round = 0; round < rounds; round++) {
    char *const tile = memory + round * 2048;
    for (int i = thread; i < 128; i += 128) copy_async16(tile + i * 16, b + round * 1024 + i * 8, 16);
    copy_commit();
  }
  if (bug == ProductBug::PROXY_FENCE_BEFORE_WAIT) shared_to_products();
  copy_wait<0>();
  if (bug != ProductBug::NO_PROXY_FENCE && bug != ProductBug::PROXY_FENCE_BEFORE_WAIT) shared_to_products();
  __syncthreads();
  if (bug == ProductBug::STORED)
    store_shared(reinterpret_cast<words4 *>(memory) + thread, words4{{0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0}});
  __syncthreads();
  for (int round = 0; round < rounds; round++) {
    if (bug == ProductBug::WAIT_FOR_TOO_FEW)
      products_wait<2>();
    else
      products_wait<1>();
    uint32_t(&x)[4] = operand[round % 2];
    if (bug == ProductBug::FENCE_BEFORE_WRITE) products_operand(x);
    for (int i = 0; i < 4; i++) memcpy(&x[i], a + round * 1024 + (row + i % 2 * 8) * 16 + lane % 4 * 2 + i / 2 * 8, 4);
    if (bug != ProductBug::NO_FENCE && bug != ProductBug::FENCE_BEFORE_WRITE) products_operand(x);
    const char *tile = memory + round * 2048 + (bug == ProductBug::LANES_DISAGREE ? lane / 16 * 128 : 0) +
                       (bug == ProductBug::OUTSIDE ? 128 : 0);
    uint64_t descriptor =
        bug == ProductBug::SWAPPED_STEPS ? matrix_descriptor(tile, 256, 128) : matrix_descriptor(tile, 128, 256);
    if (bug == ProductBug::SWIZZLED) descriptor |= uint64_t{1} << 62;
    products_add(bfloat16{}, sums, x, descriptor);
    products_commit();
    if (bug == ProductBug::OPERAND_WRITTEN) x[0]++;
    if (bug == ProductBug::SUMS_WRITTEN) sums[3] = 0;
    if (bug == ProductBug::SHARED_OVERWRITTEN) {
      store_shared(reinterpret_cast<words4 *>(memory + round * 2048) + thread, words4{{0, 0, 0, 0}});
      shared_to_products();
    }
  }
  if (bug == ProductBug::NO_WAIT) d[0] = sums[0];
  if (bug == ProductBug::END_WHILE_RUNNING) return;
  const float early = sums[0];
  products_finish(sums);
  if (bug == ProductBug::NO_WAIT) sums[0] = early;
  for (int i = 0; i < 32; i++) d[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

constexpr int kRounds = 3;

std::vector<float> run_products(ProductBug bug) {
  std::vector<uint16_t> a(64 * 16 * kRounds), b(64 * 16 * kRounds);
  for (size_t i = 0; i < a.size(); i++) a[i] = round_to(bfloat16{}, static_cast<float>(i * 7 % 23) - 11).bits;
  for (size_t i = 0; i < b.size(); i++) b[i] = round_to(bfloat16{}, static_cast<float>(i * 5 % 19) - 9).bits;
  std::vector<float> d(64 * 64);
  host::launch(products, dim3(1), dim3(128), kRounds * 2048, a.data(), b.data(), d.data(), kRounds, bug);
  return d;
}

/* d[2][64][64] = b[16][64] under two operands a[2][64][16], by two sets of sums that run side by side; b lies the other
 * way: core matrices of eight depths by eight columns, `depth_step` and `column_step` apart. */
__global__ void transposed_products(const uint16_t *a, const uint16_t *b, float *d, int depth_step, int column_step,
                                    bool start_both, bool swapped) {
  PNN_SHARED_MEMORY(memory);
  const int thread = thread_index(), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  float sums[2][32] = {};
  products_start(sums[0]);
  if (start_both) products_start(sums[1]);
  const int depth = thread / 8, column = thread % 8; /* of core matrices */
  words4 v;
  memcpy(&v, b + depth * 64 + column * 8, 16);
  store_shared(reinterpret_cast<words4 *>(memory + depth / 8 * depth_step + column * column_step + depth % 8 * 16), v);
  shared_to_products();
  __syncthreads();
  uint32_t x[2][4];
  const uint64_t descriptor = swapped ? matrix_descriptor_transposed(memory, column_step, depth_step)
                                      : matrix_descriptor_transposed(memory, depth_step, column_step);
  for (int set = 0; set < 2; set++) {
    for (int i = 0; i < 4; i++)
      memcpy(&x[set][i], a + set * 1024 + (row + i % 2 * 8) * 16 + lane % 4 * 2 + i / 2 * 8, 4);
    products_operand(x[set]);
    products_add_transposed(bfloat16{}, sums[set], x[set], descriptor);
    products_commit();
  }
  products_wait<1>(); /* the first sums are there, the second ones run */
  for (int i = 0; i < 32; i++) d[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[0][i];
  products_finish(sums[1]);
  for (int i = 0; i < 32; i++) d[4096 + (row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[1][i];
}

std::vector<float> run_transposed_products(bool start_both, bool swapped) {
  std::vector<uint16_t> a(2 * 64 * 16), b(16 * 64);
  for (size_t i = 0; i < a.size(); i++) a[i] = round_to(bfloat16{}, static_cast<float>(i * 7 % 23) - 11).bits;
  for (size_t i = 0; i < b.size(); i++) b[i] = round_to(bfloat16{}, static_cast<float>(i * 5 % 19) - 9).bits;
  std::vector<float> d(2 * 64 * 64);
  const int column_step = 144, depth_step = 8 * column_step + 16;
  host::launch(transposed_products, dim3(1), dim3(128), 9 * depth_step, a.data(), b.data(), d.data(), depth_step,
               column_step, start_both, swapped);
  return d;
}

/* d[64][64] = a[64][8] * b[8][64] of TF32: core matrices of eight columns by four depths, `depth_step` apart in depth.
 */
__global__ void tf32_products(const float *a, const float *b, float *d, int depth_step) {
  PNN_SHARED_MEMORY(memory);
  const int thread = thread_index(), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  const int half = thread / 64, column = thread % 64;
  words4 v;
  for (int k = 0; k < 4; k++) v.w[k] = bits_of(b[(half * 4 + k) * 64 + column]);
  store_shared(reinterpret_cast<words4 *>(memory + half * depth_step + column * 16), v);
  shared_to_products();
  __syncthreads();
  float sums[32] = {};
  products_start(sums);
  uint32_t x[4];
  for (int i = 0; i < 4; i++) x[i] = bits_of(a[(row + i % 2 * 8) * 8 + lane % 4 + i / 2 * 4]);
  products_operand(x);
  products_add(tf32{}, sums, x, matrix_descriptor(memory, depth_step, 128));
  products_commit();
  products_finish(sums);
  for (int i = 0; i < 32; i++) d[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <class Function>
std::vector<std::vector<float>> under_all_products(Function function) {
  std::vector<std::vector<float>> results;
  for (bool late : {false, true})
    for (std::vector<float> &result : under_all([&] {
           host::options.late_products = late;
           return function();
         }))
      results.push_back(std::move(result));
  return results;
}

TEST(AsynchronousProducts, TheCorrectKernelGivesTheSumsUnderEverySchedule) {
  const auto results = under_all_products([] { return run_products(ProductBug::NONE); });
  EXPECT_EQ(disagreements(results), 0);
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < 64; j++) {
      int sum = 1; /* b: [round][eight columns][half of the depth][column][depth] */
      for (int round = 0; round < kRounds; round++)
        for (int k = 0; k < 16; k++)
          sum += ((round * 1024 + i * 16 + k) * 7 % 23 - 11) *
                 ((round * 1024 + j / 8 * 128 + k / 8 * 64 + j % 8 * 8 + k % 8) * 5 % 19 - 9);
      ASSERT_EQ(results[0][static_cast<size_t>(i * 64 + j)], static_cast<float>(sum)) << i << ", " << j;
    }
}

TEST(AsynchronousProducts, WhatIsReadOrOverwrittenTooEarlyGivesOtherBits) {
  for (ProductBug bug : {ProductBug::NO_WAIT, ProductBug::SHARED_OVERWRITTEN})
    EXPECT_GT(disagreements(under_all_products([&] { return run_products(bug); })), 0);
  host::options.late_products = true;
  EXPECT_TRUE(std::isnan(run_products(ProductBug::NO_WAIT)[0]));
  host::options = {};
  /* The two steps of a descriptor mean different things. */
  EXPECT_NE(run_products(ProductBug::SWAPPED_STEPS), run_products(ProductBug::NONE));
}

TEST(AsynchronousProducts, TransposedOnesOfTwoSetsOfSums) {
  const auto results = under_all_products([] { return run_transposed_products(true, false); });
  EXPECT_EQ(disagreements(results), 0);
  for (int set = 0; set < 2; set++)
    for (int i = 0; i < 64; i++)
      for (int j = 0; j < 64; j++) {
        int sum = 0;
        for (int k = 0; k < 16; k++) sum += ((set * 1024 + i * 16 + k) * 7 % 23 - 11) * ((k * 64 + j) * 5 % 19 - 9);
        ASSERT_EQ(results[0][static_cast<size_t>(set * 4096 + i * 64 + j)], static_cast<float>(sum)) << i << ", " << j;
      }
  EXPECT_NE(run_transposed_products(true, true), results[0]);
}

TEST(AsynchronousProducts, Tf32ReadsTheUpperBits) {
  std::vector<float> a(64 * 8), b(8 * 64);
  for (size_t i = 0; i < a.size(); i++) a[i] = (static_cast<float>(i * 7 % 23) - 11) * (1 + 0x1p-11f);
  for (size_t i = 0; i < b.size(); i++) b[i] = (static_cast<float>(i * 5 % 19) - 9) / 8;
  const auto results = under_all_products([&] {
    std::vector<float> d(64 * 64);
    host::launch(tf32_products, dim3(1), dim3(128), 2 * 1040, a.data(), b.data(), d.data(), 1040);
    return d;
  });
  EXPECT_EQ(disagreements(results), 0);
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < 64; j++) {
      float sum = 0;
      for (int k = 0; k < 8; k++)
        sum += float_of(bits_of(a[static_cast<size_t>(i * 8 + k)]) & 0xffffe000u) * b[static_cast<size_t>(k * 64 + j)];
      ASSERT_EQ(results[0][static_cast<size_t>(i * 64 + j)], sum) << i << ", " << j;
    }
}

TEST(AsynchronousProductsDeathTest, EachSetOfSumsIsFencedByItself) {
  EXPECT_DEATH(run_transposed_products(false, false), "sums were written after their wgmma.fence");
}

TEST(AsynchronousProductsDeathTest, BrokenRulesAreReported) {
  const struct {
    ProductBug bug;
    const char *message;
  } cases[] = {{ProductBug::NO_FENCE, "operand was written after its wgmma.fence"},
               {ProductBug::FENCE_BEFORE_WRITE, "operand was written after its wgmma.fence"},
               {ProductBug::NO_START, "sums were written after their wgmma.fence"},
               {ProductBug::SUMS_WRITTEN, "sums were written while a product ran"},
               {ProductBug::OPERAND_WRITTEN, "operand was written while its product ran"},
               {ProductBug::WAIT_FOR_TOO_FEW, "operand was written while its product ran"},
               {ProductBug::NO_PROXY_FENCE, "no fence.proxy.async has handed over"},
               {ProductBug::PROXY_FENCE_BEFORE_WAIT, "no fence.proxy.async has handed over"},
               {ProductBug::STORED, "no fence.proxy.async has handed over"},
               {ProductBug::SWIZZLED, "swizzled"},
               {ProductBug::OUTSIDE, "outside of the block's shared memory"},
               {ProductBug::LANES_DISAGREE, "different matrix descriptors"},
               {ProductBug::END_WHILE_RUNNING, "its products still run"}};
  for (const auto &c : cases) EXPECT_DEATH(run_products(c.bug), c.message);
}

TEST(AsynchronousProductsDeathTest, EitherScheduleOfCopiesReportsAFenceThatCameTooEarly) {
  for (bool lazy : {false, true})
    for (bool late : {false, true}) {
      host::options.lazy_copies = lazy, host::options.late_products = late;
      EXPECT_DEATH(run_products(ProductBug::PROXY_FENCE_BEFORE_WAIT), "fence.proxy.async");
      EXPECT_DEATH(run_products(ProductBug::NO_PROXY_FENCE), "fence.proxy.async");
    }
  host::options = {};
}

__global__ void strided_loads(float *y, int stride) {
  PNN_SHARED_MEMORY(memory);
  const words4 *row = reinterpret_cast<const words4 *>(memory + static_cast<int>(threadIdx.x) * stride);
  y[threadIdx.x] = float_of(load_shared(row).w[0]);
}

TEST(Wavefronts, BankConflictsAreCounted) {
  float y[32];
  host::options.count_wavefronts = true;
  host::wavefronts = {};
  host::launch(strided_loads, dim3(1), dim3(32), 32 * 80, &y[0], 80); /* 20 words: 8 rows in 8 distinct bank groups */
  EXPECT_EQ(host::wavefronts.actual[host::LOAD], 4);
  EXPECT_EQ(host::wavefronts.ideal[host::LOAD], 4);
  host::launch(strided_loads, dim3(1), dim3(32), 32 * 128, &y[0], 128); /* 32 words: all in one bank group */
  EXPECT_EQ(host::wavefronts.actual[host::LOAD], 4 + 32);
  host::options = {};
}

TEST(Rounding, SixteenBitTypesAgreeWithTheirValues) {
  /* Every float16 survives, and the midpoints go to even. */
  for (uint32_t i = 0; i < 0x7c00; i++) {
    const float v = widen(float16{static_cast<uint16_t>(i)});
    ASSERT_EQ(round_to(float16{}, v).bits, i);
    const float next = widen(float16{static_cast<uint16_t>(i + 1)});
    if (i + 1 == 0x7c00) break;
    ASSERT_EQ(round_to(float16{}, (v + next) / 2).bits, i % 2 ? i + 1 : i);
  }
  EXPECT_EQ(round_to(float16{}, 65519.0f).bits, 0x7bff);
  EXPECT_EQ(round_to(float16{}, 65520.0f).bits, 0x7c00);
  EXPECT_EQ(round_to(bfloat16{}, 1 + 0x1p-8f).bits, 0x3f80);
  EXPECT_EQ(round_to(bfloat16{}, 1 + 0x1.8p-7f).bits, 0x3f82);
  EXPECT_EQ(round_to(bfloat16{}, 3.4e38f).bits, 0x7f80);
}

}  // namespace
