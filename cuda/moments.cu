/*
 * moments.cu - mean and variance of each response map over the batch, for normalisation in training.
 *
 * A block takes MOMENTS_COLUMNS pixels of eight maps or, of plain layers (response.h), of sixteen, and goes through
 * them twice: first for the mean c, then for the sums of (a - c) and (a - c)^2, in which nothing cancels. A power of
 * two close to the largest |a| scales the second sums, so that no square leaves float's range. Plain layers' responses
 * wait in registers in between; the others are made again. finish.cu joins the blocks' numbers in double. Each thread
 * adds its own pixels up, then lanes the threads' sums: one order for every grid.
 */
#include <string>

#include "inputs.h"
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

/* How a block's threads join their numbers of N maps, two of each: the second N are sums as well, or the largest. */
template <class R, int N>
struct Joined {
  static constexpr int ROWS = 2 * N, LANES = THREADS / ROWS;
  static constexpr int PITCH = THREADS + LANES; /* the rows that a warp reads together meet in no bank */
  static constexpr int bytes = (ROWS * PITCH + 2 * ROWS) * static_cast<int>(sizeof(R));
  R *const numbers, *const results, *const centers, *const scales;

  PNN_DEVICE explicit Joined(char *memory)
      : numbers(reinterpret_cast<R *>(memory)),
        results(numbers + ROWS * PITCH),
        centers(results + ROWS),
        scales(centers + N) {}
  /* This thread's of map e. */
  PNN_DEVICE void put(int e, R first, R second) const {
    numbers[e * PITCH + thread_index()] = first;
    numbers[(N + e) * PITCH + thread_index()] = second;
  }
  /* From all threads' numbers to `results`. */
  PNN_DEVICE void join(bool largest) const {
    const int row = thread_index() / LANES, lane = thread_index() % LANES;
    const bool compared = largest && row >= N;
    const auto joined = [compared](R a, R b) { return compared ? (b > a ? b : a) : a + b; };
    R *const own = numbers + row * PITCH + lane;
    __syncthreads();
    R sum = own[0];
#pragma unroll 4
    for (int i = 1; i < ROWS; i++) sum = joined(sum, own[i * LANES]);
    own[0] = sum; /* which no other lane reads before the barrier */
    __syncthreads();
    if (lane == 0) {
      for (int i = 1; i < LANES; i++) sum = joined(sum, own[i]);
      results[row] = sum;
    }
    __syncthreads();
  }
  /* From the first pass's results, sums of a / MOMENTS_COLUMNS over n pixels and the largest |a|. */
  PNN_DEVICE void center(R n) const {
    const int e = thread_index();
    if (e < N) {
      const R scale = scale_for(results[N + e]);
      scales[e] = scale;
      centers[e] = results[e] * (divide(static_cast<R>(MOMENTS_COLUMNS), n) * scale);
    }
    __syncthreads();
  }
  /* Writes what finish.cu joins, of the `count` maps from k on. */
  PNN_DEVICE void leave(const Layer &layer, int64_t chunk, int64_t k, int count, R *parts) const {
    const int e = thread_index();
    if (e >= count) return;
    R *const to = parts + (chunk * layer.maps + k + e) * MOMENTS_NUMBERS;
    to[0] = centers[e];
    to[1] = results[e];
    to[2] = results[N + e];
    to[3] = scales[e];
  }
};

template <class D>
__global__ void __launch_bounds__(THREADS, sizeof(D) == 8 ? 1 : 2)
    moments_kernel(const __grid_constant__ Layer layer, int64_t first_tile, const __grid_constant__ Divider by_runs,
                   typename RealOf<D>::type *parts) {
  using R = typename RealOf<D>::type;
  PNN_SHARED_MEMORY(memory);
  const Joined<R, RUN> joined(memory);
  const uint64_t seed = seed_read(layer);
  int64_t run;
  const int64_t chunk = divide(by_runs, first_tile + blockIdx.x, &run);
  const int64_t k = run * RUN, q0 = chunk * MOMENTS_COLUMNS, left = layer.maps - k;
  const int count = left < RUN ? static_cast<int>(left) : RUN;
  const int64_t q1 = q0 + MOMENTS_COLUMNS < layer.columns ? q0 + MOMENTS_COLUMNS : layer.columns;
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
#pragma unroll
    for (int e = 0; e < RUN; e++) joined.put(e, first[e], second[e]);
    joined.join(pass == 0);
    if (pass == 1) break;
    joined.center(static_cast<R>(q1 - q0));
#pragma unroll
    for (int e = 0; e < RUN; e++) center[e] = joined.centers[e], scale[e] = joined.scales[e];
  }
  joined.leave(layer, chunk, k, count, parts);
}

/* ---- plain layers ---- */

/* Pairs of neighbouring pixels that a thread takes. */
constexpr int PAIRS = MOMENTS_COLUMNS / THREADS / 2;
static_assert(PAIRS * THREADS * 2 == MOMENTS_COLUMNS, "every thread has as many");

template <class D, Reading READING>
__global__ void __launch_bounds__(THREADS, 2)
    moments_plain_kernel(const __grid_constant__ Layer layer, int64_t first_tile,
                         const __grid_constant__ Divider by_sixteens, float *parts) {
  PNN_SHARED_MEMORY(memory);
  const Joined<float, SIXTEEN> joined(memory);
  const int thread = thread_index();
  int64_t sixteen;
  const int64_t chunk = divide(by_sixteens, first_tile + blockIdx.x, &sixteen);
  const int64_t k = sixteen * SIXTEEN, q0 = chunk * MOMENTS_COLUMNS, left = layer.columns - q0;
  const int count = left < MOMENTS_COLUMNS ? static_cast<int>(left) : MOMENTS_COLUMNS;

  const int64_t step = (READING == READ_CHANNELS ? 1 : layer.input.channel) * static_cast<int64_t>(sizeof(D));
  const char *const input = layer.input.data + (k >> layer.masks_shift) * step;
  /* Pixel j of the chunk; the first one where there is none. */
  const auto place_of = [&](int j) { return place_make<true>(layer, q0 + (j < count ? j : 0)); };

  float u[PAIRS][2][SIXTEEN];
  /* All pairs' x is on its way at once where there are registers for it: float's of one pair fill them. */
  constexpr int TOGETHER = sizeof(D) == 2 ? PAIRS : 1;
  const uint64_t seed = seed_read(layer);
#pragma unroll
  for (int first = 0; first < PAIRS; first += TOGETHER) {
    const char *from[TOGETHER][2];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
#pragma unroll
      for (int p = 0; p < 2; p++)
        from[i][p] = input + place_in(layer.input, place_of(((first + i) * THREADS + thread) * 2 + p)) *
                                 static_cast<int64_t>(sizeof(D));
    with_masks<false>(layer.masks_shift, [&](auto masks) {
      InputsOf<D, READING, decltype(masks)::value> x[TOGETHER];
#pragma unroll
      for (int i = 0; i < TOGETHER; i++) x[i].load(0, from[i], step), x[i].load(1, from[i], step);
#pragma unroll
      for (int i = 0; i < TOGETHER; i++)
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
          for (int e = 0; e < SIXTEEN; e++) u[first + i][p][e] = x[i].value(p, e);
    });
    /* The places are made again: kept, they would take registers that x needs. */
    const int again = keep(thread);
#pragma unroll
    for (int i = first; i < first + TOGETHER; i++) {
      uint32_t words[2][4];
#pragma unroll
      for (int p = 0; p < 2; p++) {
        const Pixel pixel = pixel_make(layer, place_of((i * THREADS + again) * 2 + p));
        words[p][0] = pixel.column, words[p][1] = pixel.row, words[p][2] = static_cast<uint32_t>(sixteen);
        words[p][3] = 0;
      }
      philox_both(words, seed);
#pragma unroll
      for (int p = 0; p < 2; p++) {
        const bool there = (i * THREADS + again) * 2 + p < count;
#pragma unroll
        for (int e = 0; e < SIXTEEN; e++)
          u[i][p][e] =
              there ? relu_any_zero(u[i][p][e] + layer.level_float * lattice_in(words[p][e / 4], e % 4)) : 0.0f;
      }
    }
  }

#pragma unroll
  for (int e = 0; e < SIXTEEN; e++) {
    float sum = 0, most = 0;
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
      for (int p = 0; p < 2; p++) {
        sum = fma_(u[i][p][e], 1.0f / MOMENTS_COLUMNS, sum);
        most = u[i][p][e] > most ? u[i][p][e] : most;
      }
    joined.put(e, sum, most);
  }
  joined.join(true);
  joined.center(static_cast<float>(count));
  const auto put_squares = [&](auto whole) {
#pragma unroll
    for (int e = 0; e < SIXTEEN; e++) {
      const float center = joined.centers[e], scale = joined.scales[e];
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < PAIRS; i++)
#pragma unroll
        for (int p = 0; p < 2; p++) {
          const float away = fma_(u[i][p][e], scale, -center),
                      d = decltype(whole)::value || (i * THREADS + thread) * 2 + p < count ? away : 0.0f;
          sum += d;
          squares = fma_(d, d, squares);
        }
      joined.put(e, sum, squares);
    }
  };
  if (count == MOMENTS_COLUMNS)
    put_squares(std::true_type());
  else
    put_squares(std::false_type());
  joined.join(false);
  joined.leave(layer, chunk, k, SIXTEEN, parts);
}

/* ---- the host's side ---- */

/* run(first tile, blocks) for each piece of the tiles that fits a grid. */
template <class Run>
Status in_grids(int64_t tiles, Run run) {
  Status status = STATUS_OK;
  for (int64_t first = 0; first < tiles && status == STATUS_OK; first += GRID_MOST)
    status = run(first, tiles - first < GRID_MOST ? tiles - first : GRID_MOST);
  return status;
}

template <class D, Reading READING>
Status launch_plain(const Layer &layer, float *parts, Stream stream) {
  const int64_t sixteens = layer.maps / SIXTEEN;
  return in_grids(sixteens * ceil_div(layer.columns, MOMENTS_COLUMNS), [&](int64_t first, int64_t blocks) {
    Status status;
    const auto kernel = moments_plain_kernel<D, READING>;
    PNN_LAUNCH(status, kernel, blocks, THREADS, (Joined<float, SIXTEEN>::bytes), stream, layer, first,
               divider_make(sixteens), parts);
    return status;
  });
}

template <class D>
Status launch(const Layer &layer, void *parts, Stream stream) {
  using R = typename RealOf<D>::type;
  if constexpr (sizeof(D) < 8) {
    if (is_plain<D>(layer)) {
      float *const to = static_cast<float *>(parts);
      switch (reading_of<D>(layer.input_staging, layer.group_channels)) {
        case READ_PIXELS: return launch_plain<D, READ_PIXELS>(layer, to, stream);
        case READ_CHANNELS: return launch_plain<D, READ_CHANNELS>(layer, to, stream);
        default: return launch_plain<D, READ_ELEMENTS>(layer, to, stream);
      }
    }
  }
  const int64_t runs = ceil_div(layer.maps, RUN);
  return in_grids(runs * ceil_div(layer.columns, MOMENTS_COLUMNS), [&](int64_t first, int64_t blocks) {
    Status status;
    const auto kernel = moments_kernel<D>;
    PNN_LAUNCH(status, kernel, blocks, THREADS, (Joined<R, RUN>::bytes), stream, layer, first, divider_make(runs),
               static_cast<R *>(parts));
    return status;
  });
}

}  // namespace

void list_moments(Visit visit) {
  for (const std::string type : {"float", "double", "bfloat16", "float16"}) {
    visit(("moments " + type).c_str(), THREADS,
          type == "double" ? Joined<double, RUN>::bytes : Joined<float, RUN>::bytes);
    if (type == "double") continue;
    for (const char *reading : {" pixels", " channels", " elements"})
      visit(("moments_plain " + type + reading).c_str(), THREADS, Joined<float, SIXTEEN>::bytes);
  }
}

Status run_moments(const Layer &layer, int dtype, void *parts, Stream stream) {
  /* They are x's own: neither centred nor of the weight's type. */
  Layer own = layer;
  own.mean = nullptr;
  own.input_float = false;
  switch (dtype) {
    case PNN_FLOAT32: return launch<float>(own, parts, stream);
    case PNN_FLOAT64: return launch<double>(own, parts, stream);
    case PNN_BFLOAT16: return launch<bfloat16>(own, parts, stream);
    default: return launch<float16>(own, parts, stream);
  }
}

}  // namespace pnn_cuda
