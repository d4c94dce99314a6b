/*
 * finish.cu - what there is one of per map, output or weight: normalisation's algebra, joining the pieces of sums,
 * packing the weight, writing masks out. Little work, done in double where digits matter.
 */
#include <math.h>

#include "kernels.h"
#include "response.h"

namespace pnn_cuda {
namespace {

constexpr int THREADS = 128;

PNN_DEVICE double get(const void *data, int dtype, int64_t at) {
  switch (dtype) {
    case PNN_FLOAT32: return static_cast<const float *>(data)[at];
    case PNN_FLOAT64: return static_cast<const double *>(data)[at];
    case PNN_BFLOAT16: return widen(static_cast<const bfloat16 *>(data)[at]);
    default: return widen(static_cast<const float16 *>(data)[at]);
  }
}

/* x as a float from which a further rounding to 16 bits gives what one rounding would: inexact results become odd
 * (Boldo, Melquiond, "When double rounding is odd", 2005). */
PNN_DEVICE float float_to_odd(double x) {
  const float f = static_cast<float>(x);
  if (static_cast<double>(f) == x || x != x || magnitude(f) == float_of(0x7f800000u)) return f;
  uint32_t bits = bits_of(f);
  if (magnitude(static_cast<double>(f)) > magnitude(x)) bits--; /* toward zero first */
  return float_of(bits | 1);
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

inline int64_t blocks_for(int64_t count) {
  const int64_t blocks = ceil_div(count, THREADS);
  return blocks < 1 ? 1 : blocks < 65536 ? blocks : 65536;
}

PNN_DEVICE bool finite(double x) { return magnitude(x) < double_of(0x7ff0000000000000u); }

__global__ void moments_finish_kernel(const __grid_constant__ Layer layer, bool is_double, const void *parts,
                                      Vector mean, Vector variance) {
  const int64_t chunks = (layer.columns + MOMENTS_COLUMNS - 1) / MOMENTS_COLUMNS;
  for (int64_t k = first_index(); k < layer.maps; k += index_step()) {
    double n = 0, m = 0, m2 = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t at = (chunk * layer.maps + k) * MOMENTS_NUMBERS;
      const int64_t rest = layer.columns - chunk * MOMENTS_COLUMNS;
      const double count = rest < MOMENTS_COLUMNS ? static_cast<double>(rest) : MOMENTS_COLUMNS;
      const double center = get_real(parts, is_double, at), first = get_real(parts, is_double, at + 1);
      const double second = get_real(parts, is_double, at + 2), scale = get_real(parts, is_double, at + 3);
      double part = center / scale, part2 = second;
      if (finite(center)) {
        part = (center + first / count) / scale;
        part2 = second - first * first / count;
        part2 = (part2 < 0 ? 0 : part2) / scale / scale;
      } else {
        part2 = double_of(0x7ff8000000000000u); /* infinite or NaN elements have no variance */
      }
      if (n == 0) {
        n = count, m = part, m2 = part2;
        continue;
      }
      const double both = n + count, delta = part - m;
      m = finite(delta) ? m + delta * (count / both) : (m * n + part * count) / both;
      m2 = m2 + part2 + delta * delta * (n * count / both);
      n = both;
    }
    put(mean.data, mean.dtype, k * mean.step, n == 0 ? 0 : m);
    put(variance.data, variance.dtype, k * variance.step, n == 0 ? 1 : m2 / n);
  }
}

__global__ void norm_kernel(int64_t maps, bool is_double, Vector mean, Vector variance, Vector gamma, Vector beta,
                            double eps, Norm norm) {
  for (int64_t k = first_index(); k < maps; k += index_step()) {
    const double r = 1 / sqrt(get(variance.data, variance.dtype, k * variance.step) + eps);
    norm.inverse[k] = r;
    norm.scale[k] = (gamma.data ? get(gamma.data, gamma.dtype, k * gamma.step) : 1) * r;
    norm.beta[k] = beta.data ? get(beta.data, beta.dtype, k * beta.step) : 0;
    put_real(norm.mean, is_double, k, get(mean.data, mean.dtype, k * mean.step));
  }
}

/* The first map of output t's group. */
PNN_DEVICE int64_t group_map(const Layer &layer, int64_t t) { return t / layer.group_outputs * layer.group_maps; }

__global__ void weight_kernel(const __grid_constant__ Layer layer, Matrix weight, const double *scale, void *to) {
  for (int64_t i = first_index(); i < layer.outputs * layer.group_maps; i += index_step()) {
    const int64_t t = i / layer.group_maps, k = i % layer.group_maps;
    double v = get(weight.data, weight.dtype, t * weight.step[0] + k * weight.step[1]);
    if (scale) v *= scale[group_map(layer, t) + k];
    put(to, weight.dtype, t * layer.weight_step + k, v);
  }
}

__global__ void start_kernel(const __grid_constant__ Layer layer, bool is_double, Matrix weight, Vector bias,
                             const double *beta, void *start) {
  PNN_SHARED_MEMORY(memory);
  double *const shared = reinterpret_cast<double *>(memory);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t t = blockIdx.x; t < layer.outputs; t += gridDim.x) {
    double sum = 0;
    for (int64_t k = thread; k < layer.group_maps; k += THREADS)
      sum += get(weight.data, weight.dtype, t * weight.step[0] + k * weight.step[1]) * beta[group_map(layer, t) + k];
    __syncthreads();
    shared[thread] = sum;
    for (int width = THREADS / 2; width > 0; width /= 2) {
      __syncthreads();
      if (thread < width) shared[thread] += shared[thread + width];
    }
    if (thread == 0)
      put_real(start, is_double, t, (bias.data ? get(bias.data, bias.dtype, t * bias.step) : 0) + shared[0]);
  }
}

__global__ void waves_kernel(const int64_t *seed, int64_t count, uint32_t *waves) {
  for (int64_t k = first_index(); k < count; k += index_step())
    wave_make(static_cast<uint64_t>(*seed), static_cast<uint32_t>(k), waves + k * 4);
}

__global__ void join_kernel(const __grid_constant__ Layer layer, bool is_double) {
  const int64_t products = layer.products ? layer.outputs * layer.group_maps : 0;
  const int64_t totals = layer.totals ? layer.outputs : 0;
  for (int64_t i = first_index(); i < products + totals; i += index_step()) {
    void *const data = i < products ? layer.products : layer.totals;
    const int64_t at = i < products ? i : i - products, step = i < products ? products : totals;
    double sum = 0;
    for (int64_t s = 0; s < layer.splits; s++) sum += get_real(data, is_double, s * step + at);
    put_real(data, is_double, at, sum);
  }
}

__global__ void weight_store_kernel(const __grid_constant__ Layer layer, bool is_double, bool normed, Norm norm,
                                    Matrix grad_weight, Vector grad_bias) {
  const int64_t products = grad_weight.data ? layer.outputs * layer.group_maps : 0;
  const int64_t totals = grad_bias.data ? layer.outputs : 0;
  for (int64_t i = first_index(); i < products + totals; i += index_step()) {
    if (i >= products) {
      const int64_t t = i - products;
      put(grad_bias.data, grad_bias.dtype, t * grad_bias.step, get_real(layer.totals, is_double, t));
      continue;
    }
    const int64_t t = i / layer.group_maps, k = i % layer.group_maps;
    double v = get_real(layer.products, is_double, i);
    if (normed) {
      const int64_t map = group_map(layer, t) + k;
      v = norm.scale[map] * v + get_real(layer.totals, is_double, t) * norm.beta[map];
    }
    put(grad_weight.data, grad_weight.dtype, t * grad_weight.step[0] + k * grad_weight.step[1], v);
  }
}

__global__ void norm_gradient_kernel(const __grid_constant__ Layer layer, bool is_double, Matrix weight, Norm norm,
                                     Vector grad_gamma, Vector grad_beta, void *offset, void *slope) {
  for (int64_t k = first_index(); k < layer.maps; k += index_step()) {
    const int64_t group = k / layer.group_maps, in_group = k % layer.group_maps;
    double s1 = 0, s2 = 0;
    for (int64_t i = 0; i < layer.group_outputs; i++) {
      const int64_t t = group * layer.group_outputs + i;
      const double v = get(weight.data, weight.dtype, t * weight.step[0] + in_group * weight.step[1]);
      s1 += v * get_real(layer.totals, is_double, t);
      if (layer.products) s2 += v * get_real(layer.products, is_double, t * layer.group_maps + in_group);
    }
    const double alpha = norm.scale[k], r = norm.inverse[k], n = static_cast<double>(layer.columns);
    if (grad_gamma.data) put(grad_gamma.data, grad_gamma.dtype, k * grad_gamma.step, r * s2);
    if (grad_beta.data) put(grad_beta.data, grad_beta.dtype, k * grad_beta.step, s1);
    if (offset) put_real(offset, is_double, k, -alpha * s1 / n);
    if (slope) put_real(slope, is_double, k, -alpha * r * r * s2 / n);
  }
}

__global__ void mask_join_kernel(const __grid_constant__ Layer layer, bool is_double) {
  for (int64_t i = first_index(); i < layer.masks * layer.pixels; i += index_step()) {
    const int64_t m = i / layer.pixels, p = i % layer.pixels;
    double sum = 0;
    for (int64_t c = 0; c < layer.channels; c++)
      sum += get_real(layer.mask_parts, is_double, (c * layer.masks + m) * layer.pixels + p);
    const Place place = place_make(layer, p);
    const int64_t at = place.i * layer.grad_mask.row + place.j * layer.grad_mask.column + m * layer.grad_mask.batch;
    const double value =
        is_double ? layer.level * sum : static_cast<double>(static_cast<float>(layer.level) * static_cast<float>(sum));
    put(layer.grad_mask.data, layer.grad_mask.dtype, at, value);
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
  PNN_LAUNCH(status, moments_finish_kernel, blocks_for(layer.maps), THREADS, 0, stream, layer, is_double, parts, mean,
             variance);
  return status;
}

Status run_norm(const Layer &layer, bool is_double, Vector mean, Vector variance, Vector gamma, Vector beta, double eps,
                Norm norm, Stream stream) {
  Status status;
  PNN_LAUNCH(status, norm_kernel, blocks_for(layer.maps), THREADS, 0, stream, layer.maps, is_double, mean, variance,
             gamma, beta, eps, norm);
  return status;
}

Status run_weight(const Layer &layer, Matrix weight, const double *scale, void *to, Stream stream) {
  Status status;
  PNN_LAUNCH(status, weight_kernel, blocks_for(layer.outputs * layer.group_maps), THREADS, 0, stream, layer, weight,
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

Status run_join(const Layer &layer, bool is_double, Stream stream) {
  if (layer.splits == 1) return STATUS_OK;
  Status status;
  PNN_LAUNCH(status, join_kernel, blocks_for(layer.outputs * (layer.group_maps + 1)), THREADS, 0, stream, layer,
             is_double);
  return status;
}

Status run_weight_store(const Layer &layer, bool is_double, const Norm *norm, Matrix grad_weight, Vector grad_bias,
                        Stream stream) {
  Status status;
  PNN_LAUNCH(status, weight_store_kernel, blocks_for(layer.outputs * (layer.group_maps + 1)), THREADS, 0, stream, layer,
             is_double, norm != nullptr, norm ? *norm : Norm{}, grad_weight, grad_bias);
  return status;
}

Status run_norm_gradient(const Layer &layer, bool is_double, Matrix weight, Norm norm, Vector grad_gamma,
                         Vector grad_beta, void *offset, void *slope, Stream stream) {
  Status status;
  PNN_LAUNCH(status, norm_gradient_kernel, blocks_for(layer.maps), THREADS, 0, stream, layer, is_double, weight, norm,
             grad_gamma, grad_beta, offset, slope);
  return status;
}

Status run_mask_join(const Layer &layer, bool is_double, Stream stream) {
  Status status;
  PNN_LAUNCH(status, mask_join_kernel, blocks_for(layer.masks * layer.pixels), THREADS, 0, stream, layer, is_double);
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
