/*
 * moments.cu - mean and variance of each response map over the batch, for normalisation in training.
 *
 * A block takes eight maps and MOMENTS_COLUMNS pixels, twice over the same x, which is in cache the second time: first
 * the mean c, then the sums of (a - c) and (a - c)^2, in which nothing cancels. A power of two close to the largest |a|
 * scales the second sums, so that no square leaves float's range. finish.cu joins the blocks' numbers in double. Each
 * thread adds its own pixels up, the threads' sums join as a tree: one order for every grid.
 */
#include "kernels.h"
#include "response.h"

namespace pnn_cuda {
namespace {

constexpr int THREADS = 256;

template <class R>
struct Range; /* of a number's exponent field */
template <>
struct Range<float> {
  static constexpr int shift = 23, most = 253;
};
template <>
struct Range<double> {
  static constexpr int shift = 52, most = 2045;
};

/* 2^-e for x's exponent e, kept normal; 1 for zero. */
template <class R>
PNN_DEVICE R scale_for(R x) {
  using U = decltype(bits_of(x));
  int field = static_cast<int>(bits_of(x) >> Range<R>::shift);
  if (field == 0 || field > Range<R>::most) return R(1);
  return real_of_bits(static_cast<U>(Range<R>::most + 1 - field) << Range<R>::shift);
}

/* v[e] becomes the sum (or the largest) of all threads' v[e]. */
template <class R>
PNN_DEVICE void join_threads(R v[RUN], R *shared, bool largest) {
  const int thread = thread_index();
  __syncthreads();
#pragma unroll
  for (int e = 0; e < RUN; e++) shared[e * THREADS + thread] = v[e];
#pragma unroll 1
  for (int width = THREADS / 2; width > 0; width /= 2) {
    __syncthreads();
    for (int i = thread; i < width * RUN; i += THREADS) {
      R *at = shared + i / width * THREADS + i % width;
      const R other = at[width];
      at[0] = largest ? (other > at[0] ? other : at[0]) : at[0] + other;
    }
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < RUN; e++) v[e] = shared[e * THREADS];
}

template <class D>
__global__ void __launch_bounds__(THREADS, sizeof(D) == 8 ? 1 : 2)
    moments_kernel(const __grid_constant__ Layer layer, int64_t first_tile, const __grid_constant__ Divider by_runs,
                   typename RealOf<D>::type *parts) {
  using R = typename RealOf<D>::type;
  PNN_SHARED_MEMORY(memory);
  R *const shared = reinterpret_cast<R *>(memory);
  const uint64_t seed = seed_read(layer);
  int64_t run;
  const int64_t chunk = divide(by_runs, first_tile + blockIdx.x, &run);
  const int64_t k = run * RUN, q0 = chunk * MOMENTS_COLUMNS, left = layer.maps - k;
  const int count = left < RUN ? static_cast<int>(left) : RUN;
  const int64_t q1 = q0 + MOMENTS_COLUMNS < layer.columns ? q0 + MOMENTS_COLUMNS : layer.columns;
  const R n = static_cast<R>(q1 - q0);
  const Map map = map_make(layer, k);

  R center[RUN], scale[RUN], first[RUN], second[RUN];
#pragma unroll
  for (int e = 0; e < RUN; e++) center[e] = 0, scale[e] = R(1) / MOMENTS_COLUMNS;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
#pragma unroll
    for (int e = 0; e < RUN; e++) first[e] = second[e] = 0;
#pragma unroll 1
    for (int64_t q = q0 + threadIdx.x; q < q1; q += THREADS) {
      const Place place = place_make(layer, q);
      const Source<int64_t> x = source_in<D>(layer, place_in(layer.input, place), map.c);
      R u[RUN];
      Generated last = nothing_generated();
      perturbed<D>(layer, seed, x, k, map, count, pixel_make(layer, place), &last, u);
      activate_run(layer.activation, u);
#pragma unroll
      for (int e = 0; e < RUN; e++) {
        const R d = fma_(u[e], scale[e], -center[e]);
        first[e] += d;
        const R size = magnitude(u[e]);
        second[e] = pass == 0 ? (size > second[e] ? size : second[e]) : fma_(d, d, second[e]);
      }
    }
    join_threads(first, shared, false);
    join_threads(second, shared, pass == 0);
    if (pass == 1) break;
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      scale[e] = scale_for(second[e]);
      center[e] = first[e] * (divide(static_cast<R>(MOMENTS_COLUMNS), n) * scale[e]);
    }
  }
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int e = 0; e < RUN; e++) {
    if (e >= count) break;
    R *out = parts + (chunk * layer.maps + k + e) * MOMENTS_NUMBERS;
    out[0] = center[e];
    out[1] = first[e];
    out[2] = second[e];
    out[3] = scale[e];
  }
}

template <class D>
Status launch(const Layer &layer, void *parts, Stream stream) {
  using R = typename RealOf<D>::type;
  const int64_t runs = ceil_div(layer.maps, RUN), tiles = runs * ceil_div(layer.columns, MOMENTS_COLUMNS);
  Status status = STATUS_OK;
  for (int64_t first = 0; first < tiles && status == STATUS_OK; first += GRID_MOST) {
    const int64_t blocks = tiles - first < GRID_MOST ? tiles - first : GRID_MOST;
    const auto kernel = moments_kernel<D>;
    PNN_LAUNCH(status, kernel, blocks, THREADS, THREADS * RUN * sizeof(R), stream, layer, first, divider_make(runs),
               static_cast<R *>(parts));
  }
  return status;
}

}  // namespace

void list_moments(Visit visit) {
  visit("moments float", THREADS, THREADS * RUN * static_cast<int64_t>(sizeof(float)));
  visit("moments double", THREADS, THREADS * RUN * static_cast<int64_t>(sizeof(double)));
  visit("moments bfloat16", THREADS, THREADS * RUN * static_cast<int64_t>(sizeof(float)));
  visit("moments float16", THREADS, THREADS * RUN * static_cast<int64_t>(sizeof(float)));
}

Status run_moments(const Layer &layer, int dtype, void *parts, Stream stream) {
  switch (dtype) {
    case PNN_FLOAT32: return launch<float>(layer, parts, stream);
    case PNN_FLOAT64: return launch<double>(layer, parts, stream);
    case PNN_BFLOAT16: return launch<bfloat16>(layer, parts, stream);
    default: return launch<float16>(layer, parts, stream);
  }
}

}  // namespace pnn_cuda
