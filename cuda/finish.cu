/*
 * finish.cu - what there is one of per map, output or weight: normalisation's algebra, joining the pieces of sums,
 * packing the weight, writing masks out. Little work, done in double where digits matter.
 *
 * Where each result is a sum, its time is that of loads that wait for one another, so a block's threads share sums
 * out: THREADS / columns "lanes" take every so manieth piece of each of `columns` neighbouring sums, a few loads at
 * once, and join as a tree. How many lanes depends on the sizes alone, and with it the order of each sum.
 */
#include <math.h>

#include "kernels.h"
#include "response.h"

namespace pnn_cuda {
namespace {

constexpr int THREADS = 256;

PNN_DEVICE double get(const void *data, int dtype, int64_t at) {
  switch (dtype) {
    case PNN_FLOAT32: return static_cast<const float *>(data)[at];
    case PNN_FLOAT64: return static_cast<const double *>(data)[at];
    case PNN_BFLOAT16: return widen(static_cast<const bfloat16 *>(data)[at]);
    default: return widen(static_cast<const float16 *>(data)[at]);
  }
}

PNN_DEVICE void put(void *data, int dtype, int64_t at, double x) {
  switch (dtype) {
    case PNN_FLOAT32: static_cast<float *>(data)[at] = static_cast<float>(x); break;
    case PNN_FLOAT64: static_cast<double *>(data)[at] = x; break;
    case PNN_BFLOAT16: static_cast<bfloat16 *>(data)[at] = round_to(bfloat16{}, float_to_odd(x)); break;
    default: static_cast<float16 *>(data)[at] = round_to(float16{}, float_to_odd(x)); break;
  }
}

PNN_DEVICE double get_real(const void *data, bool is_double, int64_t at) {
  return get(data, is_double ? PNN_FLOAT64 : PNN_FLOAT32, at);
}
PNN_DEVICE void put_real(void *data, bool is_double, int64_t at, double x) {
  put(data, is_double ? PNN_FLOAT64 : PNN_FLOAT32, at, x);
}

/* This thread's index among `count`, one after another a grid apart. */
PNN_DEVICE int64_t first_index() { return static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; }
PNN_DEVICE int64_t index_step() { return static_cast<int64_t>(gridDim.x) * THREADS; }

inline int64_t blocks_for(int64_t count, int columns = THREADS) {
  const int64_t blocks = ceil_div(count, columns);
  return blocks < 1 ? 1 : blocks < 65536 ? blocks : 65536;
}

/* ---- sums shared by lanes ---- */

/* Pieces that a lane loads at once. */
constexpr int BATCH = 8;

/* The fewest columns: eight floats are the 32 bytes that memory moves at once. */
constexpr int SUM_COLUMNS = 8;

/* How many sums a block takes where a lane should have `share` of a sum's pieces, if there can be enough lanes. */
inline int columns_for(int64_t pieces, int share, int least) {
  int columns = THREADS;
  while (columns > least && static_cast<int64_t>(THREADS / columns) * share < pieces) columns /= 2;
  return columns;
}

/* A thread's place in its block; `columns` is a power of two. */
struct Part {
  int column, lane, lanes;
};

PNN_DEVICE Part part_make(int columns) {
  const int thread = static_cast<int>(threadIdx.x);
  return {thread % columns, thread / columns, THREADS / columns};
}

/* Pieces first, first + step, ... before end. */
struct Slice {
  int64_t first, step, end;
};

template <class D, int N>
PNN_DEVICE void get_pieces(const D *data, int64_t apart, Slice pieces, double (&v)[N]) {
  D raw[N] = {};
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int64_t piece = pieces.first + i * pieces.step;
    if (piece < pieces.end) raw[i] = data[piece * apart];
  }
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = widen(raw[i]);
}

/* v[i] = piece i of those, which lie `apart` elements apart from `at` on, or zero past the end. All are loaded before
 * the first is used. */
template <int N>
PNN_DEVICE void get_pieces(const void *data, int dtype, int64_t at, int64_t apart, Slice pieces, double (&v)[N]) {
  switch (dtype) {
    case PNN_FLOAT32: return get_pieces(static_cast<const float *>(data) + at, apart, pieces, v);
    case PNN_FLOAT64: return get_pieces(static_cast<const double *>(data) + at, apart, pieces, v);
    case PNN_BFLOAT16: return get_pieces(static_cast<const bfloat16 *>(data) + at, apart, pieces, v);
    default: return get_pieces(static_cast<const float16 *>(data) + at, apart, pieces, v);
  }
}

template <int N>
PNN_DEVICE void get_real_pieces(const void *data, bool is_double, int64_t at, int64_t apart, Slice pieces,
                                double (&v)[N]) {
  if (is_double)
    get_pieces(static_cast<const double *>(data) + at, apart, pieces, v);
  else
    get_pieces(static_cast<const float *>(data) + at, apart, pieces, v);
}

PNN_DEVICE double join(double a, double b) { return a + b; }

/* In the threads of lane 0, the lanes' values of their column joined. Every thread of the block calls it. */
template <class T>
PNN_DEVICE T join_lanes(T mine, int columns, T *shared) {
  if (columns == THREADS) return mine;
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads(); /* the last call's are read */
  shared[thread] = mine;
  for (int width = THREADS / 2; width >= columns; width /= 2) {
    __syncthreads();
    if (thread < width) shared[thread] = join(shared[thread], shared[thread + width]);
  }
  return shared[thread];
}

/* This lane's share of the sum of `count` reals, `apart` elements apart from `at` on. */
PNN_DEVICE double share_of_sum(const void *data, bool is_double, int64_t at, int64_t apart, int64_t count,
                               const Part &part) {
  double sum = 0;
#pragma unroll 1
  for (int64_t piece = part.lane; piece < count; piece += BATCH * part.lanes) {
    double v[BATCH];
    get_real_pieces(data, is_double, at, apart, {piece, part.lanes, count}, v);
#pragma unroll
    for (int i = 0; i < BATCH; i++) sum += v[i];
  }
  return sum;
}

/* ---- the kernels ---- */

PNN_DEVICE bool finite(double x) { return magnitude(x) < double_of(0x7ff0000000000000u); }

/* The number of elements, their mean, and the sum of their squared distances from it. */
struct Moments {
  double n, mean, squares;
};

/* Both sets' (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
 * No elements may be a alone, or both: every lane of a map has a chunk where there is one. */
PNN_DEVICE Moments join(const Moments &a, const Moments &b) {
  if (a.n == 0) return b;
  const double n = a.n + b.n, weight = b.n / n, delta = b.mean - a.mean;
  const double mean = finite(delta) ? a.mean + delta * weight : a.mean * (a.n / n) + b.mean * weight;
  return {n, mean, a.squares + b.squares + delta * delta * (a.n * weight)};
}

/* Of `count` elements, from what the moments' kernel leaves. Its scale is a power of two, whose inverse is exact. */
PNN_DEVICE Moments moments_of(double center, double first, double second, double scale, double count) {
  const double inverse = 1 / scale, nan = double_of(0x7ff8000000000000u);
  if (!finite(center)) return {count, center * inverse, nan}; /* infinite or NaN elements have no variance */
  const double beside = first / count, squares = second - first * beside;
  return {count, (center + beside) * inverse, (squares < 0 ? 0 : squares) * inverse * inverse};
}

/* A chunk's algebra takes as long as two levels of the lanes' tree. */
constexpr int MOMENTS_SHARE = 2, MOMENTS_LEAST_COLUMNS = 1;

__global__ void moments_finish_kernel(const __grid_constant__ Layer layer, bool is_double, const void *parts,
                                      int columns, Vector mean, Vector variance) {
  PNN_SHARED_MEMORY(memory);
  const Part part = part_make(columns);
  const int64_t chunks = (layer.columns + MOMENTS_COLUMNS - 1) / MOMENTS_COLUMNS;
  const int64_t step = static_cast<int64_t>(gridDim.x) * columns;
  for (int64_t k0 = static_cast<int64_t>(blockIdx.x) * columns; k0 < layer.maps; k0 += step) {
    const int64_t k = k0 + part.column;
    Moments moments = {0, 0, 0};
    if (k < layer.maps) {
#pragma unroll 1
      for (int64_t chunk = part.lane; chunk < chunks; chunk += part.lanes) {
        double v[MOMENTS_NUMBERS];
        get_real_pieces(parts, is_double, (chunk * layer.maps + k) * MOMENTS_NUMBERS, 1, {0, 1, MOMENTS_NUMBERS}, v);
        const int64_t rest = layer.columns - chunk * MOMENTS_COLUMNS;
        const double count = rest < MOMENTS_COLUMNS ? static_cast<double>(rest) : MOMENTS_COLUMNS;
        moments = join(moments, moments_of(v[0], v[1], v[2], v[3], count));
      }
    }
    moments = join_lanes(moments, columns, reinterpret_cast<Moments *>(memory));
    if (part.lane != 0 || k >= layer.maps) continue;
    put(mean.data, mean.dtype, k * mean.step, moments.n == 0 ? 0 : moments.mean);
    put(variance.data, variance.dtype, k * variance.step, moments.n == 0 ? 1 : moments.squares / moments.n);
  }
}

__global__ void norm_kernel(int64_t maps, bool is_double, Vector mean, Vector variance, Vector gamma, Vector beta,
                            double eps, Norm norm) {
  for (int64_t k = first_index(); k < maps + NO_MAPS; k += index_step()) {
    if (k >= maps) {
      put_real(norm.mean, is_double, k, 0);
      continue;
    }
    const double r = 1 / sqrt(get(variance.data, variance.dtype, k * variance.step) + eps);
    norm.inverse[k] = r;
    norm.scale[k] = (gamma.data ? get(gamma.data, gamma.dtype, k * gamma.step) : 1) * r;
    norm.beta[k] = beta.data ? get(beta.data, beta.dtype, k * beta.step) : 0;
    put_real(norm.mean, is_double, k, get(mean.data, mean.dtype, k * mean.step));
  }
}

/* The first map of output t's group. */
PNN_DEVICE int64_t group_map(const Layer &layer, int64_t t) { return t / layer.group_outputs * layer.group_maps; }

/* Rows end with zeros, so that whole runs of 16 bytes may be read. */
__global__ void weight_kernel(const __grid_constant__ Layer layer, Matrix weight, const double *scale, void *to) {
  for (int64_t i = first_index(); i < layer.outputs * layer.weight_step; i += index_step()) {
    const int64_t t = i / layer.weight_step, k = i % layer.weight_step;
    double v = 0;
    if (k < layer.group_maps) {
      v = get(weight.data, weight.dtype, t * weight.step[0] + k * weight.step[1]);
      if (scale) v *= scale[group_map(layer, t) + k];
    }
    put(to, weight.dtype, i, v);
  }
}

/* A block takes one output at a time: neighbouring lanes read neighbouring maps. */
__global__ void start_kernel(const __grid_constant__ Layer layer, bool is_double, Matrix weight, Vector bias,
                             const double *beta, void *start) {
  PNN_SHARED_MEMORY(memory);
  const Part part = part_make(1);
  for (int64_t t = blockIdx.x; t < layer.outputs; t += gridDim.x) {
    double sum = 0;
#pragma unroll 1
    for (int64_t k = part.lane; k < layer.group_maps; k += BATCH * part.lanes) {
      const Slice pieces = {k, part.lanes, layer.group_maps};
      double v[BATCH], b[BATCH];
      get_pieces(beta + group_map(layer, t), 1, pieces, b);
      get_pieces(weight.data, weight.dtype, t * weight.step[0], weight.step[1], pieces, v);
#pragma unroll
      for (int i = 0; i < BATCH; i++) sum += v[i] * b[i];
    }
    sum = join_lanes(sum, 1, reinterpret_cast<double *>(memory));
    if (part.lane == 0)
      put_real(start, is_double, t, (bias.data ? get(bias.data, bias.dtype, t * bias.step) : 0) + sum);
  }
}

__global__ void waves_kernel(const int64_t *seed, int64_t count, uint32_t *waves) {
  for (int64_t k = first_index(); k < count; k += index_step())
    wave_make(static_cast<uint64_t>(*seed), static_cast<uint32_t>(k), waves + k * 4);
}

/* The splits' sums; may go where the first split lies. */
__global__ void weight_store_kernel(const __grid_constant__ Layer layer, bool is_double, int columns, bool normed,
                                    Norm norm, Matrix grad_weight, Vector grad_bias) {
  PNN_SHARED_MEMORY(memory);
  const Part part = part_make(columns);
  const int64_t products = grad_weight.data ? layer.outputs * layer.group_maps : 0;
  const int64_t count = products + (grad_bias.data ? layer.outputs : 0);
  const int64_t step = static_cast<int64_t>(gridDim.x) * columns;
  for (int64_t i0 = static_cast<int64_t>(blockIdx.x) * columns; i0 < count; i0 += step) {
    const int64_t i = i0 + part.column;
    double sum = 0;
    if (i < products)
      sum = share_of_sum(layer.products, is_double, i, products, layer.splits, part);
    else if (i < count)
      sum = share_of_sum(layer.totals, is_double, i - products, layer.outputs, layer.splits, part);
    sum = join_lanes(sum, columns, reinterpret_cast<double *>(memory));
    if (part.lane != 0 || i >= count) continue;
    if (i >= products) {
      put(grad_bias.data, grad_bias.dtype, (i - products) * grad_bias.step, sum);
      continue;
    }
    const int64_t t = i / layer.group_maps, k = i % layer.group_maps;
    if (normed) {
      const int64_t map = group_map(layer, t) + k;
      sum = norm.scale[map] * sum + get_real(layer.totals, is_double, t) * norm.beta[map];
    }
    put(grad_weight.data, grad_weight.dtype, t * grad_weight.step[0] + k * grad_weight.step[1], sum);
  }
}

/* The sums over a map's outputs that its normalisation's gradients are made of. */
struct NormSums {
  double totals, products;
};
PNN_DEVICE NormSums join(const NormSums &a, const NormSums &b) {
  return {a.totals + b.totals, a.products + b.products};
}

__global__ void norm_gradient_kernel(const __grid_constant__ Layer layer, bool is_double, int columns, Matrix weight,
                                     Norm norm, Vector grad_gamma, Vector grad_beta, void *offset, void *slope) {
  PNN_SHARED_MEMORY(memory);
  const Part part = part_make(columns);
  const int64_t step = static_cast<int64_t>(gridDim.x) * columns;
  for (int64_t k0 = static_cast<int64_t>(blockIdx.x) * columns; k0 < layer.maps; k0 += step) {
    const int64_t k = k0 + part.column;
    NormSums sums = {0, 0};
    if (k < layer.maps) {
      const int64_t t0 = k / layer.group_maps * layer.group_outputs, in_group = k % layer.group_maps;
#pragma unroll 1
      for (int64_t t = part.lane; t < layer.group_outputs; t += BATCH * part.lanes) {
        const Slice pieces = {t, part.lanes, layer.group_outputs};
        double v[BATCH], total[BATCH], product[BATCH];
        get_real_pieces(layer.totals, is_double, t0, 1, pieces, total);
        if (layer.products)
          get_real_pieces(layer.products, is_double, t0 * layer.group_maps + in_group, layer.group_maps, pieces,
                          product);
        get_pieces(weight.data, weight.dtype, t0 * weight.step[0] + in_group * weight.step[1], weight.step[0], pieces,
                   v);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          sums.totals += v[i] * total[i];
          if (layer.products) sums.products += v[i] * product[i];
        }
      }
    }
    sums = join_lanes(sums, columns, reinterpret_cast<NormSums *>(memory));
    if (part.lane != 0 || k >= layer.maps) continue;
    const double alpha = norm.scale[k], r = norm.inverse[k], n = static_cast<double>(layer.columns);
    if (grad_gamma.data) put(grad_gamma.data, grad_gamma.dtype, k * grad_gamma.step, r * sums.products);
    if (grad_beta.data) put(grad_beta.data, grad_beta.dtype, k * grad_beta.step, sums.totals);
    if (offset) put_real(offset, is_double, k, -alpha * sums.totals / n);
    if (slope) put_real(slope, is_double, k, -alpha * r * r * sums.products / n);
  }
}

__global__ void mask_join_kernel(const __grid_constant__ Layer layer, bool is_double, int columns) {
  PNN_SHARED_MEMORY(memory);
  const Part part = part_make(columns);
  const int64_t count = layer.masks * layer.pixels, step = static_cast<int64_t>(gridDim.x) * columns;
  for (int64_t i0 = static_cast<int64_t>(blockIdx.x) * columns; i0 < count; i0 += step) {
    const int64_t i = i0 + part.column;
    double sum = i < count ? share_of_sum(layer.mask_parts, is_double, i, count, layer.channels, part) : 0;
    sum = join_lanes(sum, columns, reinterpret_cast<double *>(memory));
    if (part.lane != 0 || i >= count) continue;
    const Place place = place_make(layer, i); /* its `image` is the mask */
    const double value =
        is_double ? layer.level * sum : static_cast<double>(static_cast<float>(layer.level) * static_cast<float>(sum));
    put(layer.grad_mask.data, layer.grad_mask.dtype, place_in(layer.grad_mask, place), value);
  }
}

__global__ void clear_kernel(pnn_tensor t, int64_t size) {
  const int64_t count = t.size[0] * t.size[1] * t.size[2] * t.size[3];
  for (int64_t i = first_index(); i < count; i += index_step()) {
    int64_t rest = i, at = 0;
    for (int d = 3; d >= 0; d--) {
      at += rest % t.size[d] * t.stride[d];
      rest /= t.size[d];
    }
    if (size == 2) static_cast<uint16_t *>(t.data)[at] = 0;
    if (size == 4) static_cast<uint32_t *>(t.data)[at] = 0;
    if (size == 8) static_cast<uint64_t *>(t.data)[at] = 0;
  }
}

/* A thread writes sixteen maps of a pixel: what one call of the generator gives. */
__global__ void mask_fill_kernel(pnn_tensor mask, int noise, const int64_t *seed_) {
  Layer layer;
  layer.noise = noise;
  layer.waves = nullptr;
  const uint64_t seed = static_cast<uint64_t>(*seed_);
  const int64_t maps = mask.size[0] * mask.size[1], pixels = mask.size[2] * mask.size[3], runs = (maps + 15) / 16;
  for (int64_t i = first_index(); i < runs * pixels; i += index_step()) {
    const int64_t k0 = i / pixels * 16, row = i % pixels / mask.size[3], column = i % mask.size[3];
    uint32_t words[4] = {}, made = NOTHING_MADE;
    for (int64_t k = k0; k < k0 + 16 && k < maps; k++) {
      float value;
      if (noise == PNN_NOISE_WAVES) {
        uint32_t wave[4];
        wave_make(seed, static_cast<uint32_t>(k), wave);
        value = wave_value(wave[0], wave[1], wave[2], static_cast<uint32_t>(row), static_cast<uint32_t>(column));
      } else {
        value = recipe_value(layer, seed, static_cast<uint32_t>(k), static_cast<uint32_t>(row),
                             static_cast<uint32_t>(column), words, &made);
      }
      const int64_t at = k / mask.size[1] * mask.stride[0] + k % mask.size[1] * mask.stride[1] + row * mask.stride[2] +
                         column * mask.stride[3];
      put(mask.data, mask.dtype, at, value);
    }
  }
}

}  // namespace

Status run_moments_finish(const Layer &layer, bool is_double, const void *parts, Vector mean, Vector variance,
                          Stream stream) {
  Status status;
  const int columns = columns_for(ceil_div(layer.columns, MOMENTS_COLUMNS), MOMENTS_SHARE, MOMENTS_LEAST_COLUMNS);
  PNN_LAUNCH(status, moments_finish_kernel, blocks_for(layer.maps, columns), THREADS, THREADS * sizeof(Moments), stream,
             layer, is_double, parts, columns, mean, variance);
  return status;
}

Status run_norm(const Layer &layer, bool is_double, Vector mean, Vector variance, Vector gamma, Vector beta, double eps,
                Norm norm, Stream stream) {
  Status status;
  PNN_LAUNCH(status, norm_kernel, blocks_for(layer.maps + NO_MAPS), THREADS, 0, stream, layer.maps, is_double, mean,
             variance, gamma, beta, eps, norm);
  return status;
}

Status run_weight(const Layer &layer, Matrix weight, const double *scale, void *to, Stream stream) {
  Status status;
  PNN_LAUNCH(status, weight_kernel, blocks_for(layer.outputs * layer.weight_step), THREADS, 0, stream, layer, weight,
             scale, to);
  return status;
}

Status run_start(const Layer &layer, bool is_double, Matrix weight, Vector bias, const double *beta, void *start,
                 Stream stream) {
  Status status;
  const int64_t blocks = layer.outputs < 65536 ? layer.outputs : 65536;
  if (blocks == 0) return STATUS_OK;
  PNN_LAUNCH(status, start_kernel, blocks, THREADS, THREADS * sizeof(double), stream, layer, is_double, weight, bias,
             beta, start);
  return status;
}

Status run_waves(const Layer &layer, int64_t count, uint32_t *waves, Stream stream) {
  Status status;
  PNN_LAUNCH(status, waves_kernel, blocks_for(count), THREADS, 0, stream, layer.seed, count, waves);
  return status;
}

Status run_weight_store(const Layer &layer, bool is_double, const Norm *norm, Matrix grad_weight, Vector grad_bias,
                        Stream stream) {
  Status status;
  const int columns = columns_for(layer.splits, BATCH, SUM_COLUMNS);
  PNN_LAUNCH(status, weight_store_kernel, blocks_for(layer.outputs * (layer.group_maps + 1), columns), THREADS,
             THREADS * sizeof(double), stream, layer, is_double, columns, norm != nullptr, norm ? *norm : Norm{},
             grad_weight, grad_bias);
  return status;
}

Status run_join(Layer &layer, bool is_double, Stream stream) {
  if (layer.splits == 1) return STATUS_OK;
  const int real = is_double ? PNN_FLOAT64 : PNN_FLOAT32;
  const Status status = run_weight_store(layer, is_double, nullptr, {layer.products, real, {layer.group_maps, 1}},
                                         {layer.totals, real, 1}, stream);
  layer.splits = 1;
  return status;
}

Status run_norm_gradient(const Layer &layer, bool is_double, Matrix weight, Norm norm, Vector grad_gamma,
                         Vector grad_beta, void *offset, void *slope, Stream stream) {
  Status status;
  const int columns = columns_for(layer.group_outputs, BATCH, SUM_COLUMNS);
  PNN_LAUNCH(status, norm_gradient_kernel, blocks_for(layer.maps, columns), THREADS, THREADS * sizeof(NormSums), stream,
             layer, is_double, columns, weight, norm, grad_gamma, grad_beta, offset, slope);
  return status;
}

Status run_mask_join(const Layer &layer, bool is_double, Stream stream) {
  Status status;
  const int columns = columns_for(layer.channels, BATCH, SUM_COLUMNS);
  PNN_LAUNCH(status, mask_join_kernel, blocks_for(layer.masks * layer.pixels, columns), THREADS,
             THREADS * sizeof(double), stream, layer, is_double, columns);
  return status;
}

Status run_clear(const pnn_tensor &tensor, int64_t size, Stream stream) {
  Status status;
  const int64_t count = tensor.size[0] * tensor.size[1] * tensor.size[2] * tensor.size[3];
  if (count == 0) return STATUS_OK;
  PNN_LAUNCH(status, clear_kernel, blocks_for(count), THREADS, 0, stream, tensor, size);
  return status;
}

Status run_mask_fill(const pnn_tensor &mask, int noise, const int64_t *seed, Stream stream) {
  Status status;
  const int64_t count = ceil_div(mask.size[0] * mask.size[1], 16) * mask.size[2] * mask.size[3];
  if (count == 0) return STATUS_OK;
  PNN_LAUNCH(status, mask_fill_kernel, blocks_for(count), THREADS, 0, stream, mask, noise, seed);
  return status;
}

}  // namespace pnn_cuda
