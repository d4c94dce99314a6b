/*
 * kernels.h - what api.cu launches: one function for each kernel, on the host's side, and the sizes both sides agree
 * on.
 */
#ifndef PNN_CUDA_KERNELS_H
#define PNN_CUDA_KERNELS_H

#include <type_traits>

#include "layer.h"

namespace pnn_cuda {

#if defined(__CUDACC__)
using Stream = cudaStream_t;
using Status = cudaError_t;
constexpr Status STATUS_OK = cudaSuccess;
#define PNN_LAUNCH(result, kernel, blocks, threads, shared, stream, ...)                                             \
  do {                                                                                                               \
    Status status_ = STATUS_OK;                                                                                      \
    if ((shared) > 48 * 1024)                                                                                        \
      status_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)); \
    if (status_ == STATUS_OK) {                                                                                      \
      kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(threads), (shared), (stream)>>>(__VA_ARGS__);               \
      status_ = cudaGetLastError();                                                                                  \
    }                                                                                                                \
    (result) = status_;                                                                                              \
  } while (0)
#else
using Stream = void *;
using Status = int;
constexpr Status STATUS_OK = 0;
#define PNN_LAUNCH(result, kernel, blocks, threads, shared, stream, ...)                                     \
  do {                                                                                                       \
    (void)(stream);                                                                                          \
    cuda_on_host::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), (shared), __VA_ARGS__); \
    (result) = STATUS_OK;                                                                                    \
  } while (0)
#endif

/* A product's tiles: its blocks in a line, cut where a grid's size ends. */
constexpr int64_t GRID_MOST = 0x7fffffff;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Two shapes of tiles: large ones read less, small ones leave no multiprocessor idle in small problems. */
struct Large {
  static constexpr int rows = 128, columns = 128, threads = 256;
};
struct Small {
  static constexpr int rows = 64, columns = 64, threads = 128;
};
template <class D>
constexpr bool on_tensor_cores = sizeof(D) == 2 || std::is_same<D, tf32>::value;
/* Blocks that must fit on a multiprocessor by their registers. On the tensor cores a warp waits four cycles for each in
 * which it issues, so four warps to a scheduler are wanted, with 128 registers to a thread; TF32 in large tiles takes
 * more where layers are not plain (response.h). Fused multiply-adds have their own to wait behind. */
template <class D, class S, bool PLAIN>
constexpr int blocks_of = !on_tensor_cores<D> || (sizeof(D) == 4 && !PLAIN) ? S::threads == 256 ? 1 : 2
                          : S::threads == 256                               ? 2
                          : PLAIN                                           ? 4
                                                                            : 3;
/* Large tiles where they still give a large GPU this many blocks; of the weight gradient, which cuts its sum into as
 * many pieces as it takes, where there are rows and columns for them. Results do not depend on it. */
#if defined(__CUDACC__)
inline int64_t wanted_blocks() { return 128; }
inline int64_t multiprocessors() { return 132; }
#else
inline int64_t wanted_blocks() { return cuda_on_host::options.wanted_blocks; }
inline int64_t multiprocessors() { return cuda_on_host::options.multiprocessors; }
#endif
inline bool enough_blocks(const Layer &layer, int64_t rows) {
  return ceil_div(rows, Large::rows) * ceil_div(layer.columns, Large::columns) * layer.groups >= wanted_blocks();
}
inline bool weight_gradient_is_large(const Layer &layer) {
  return !layer.input_float && layer.group_outputs > Small::rows && layer.group_maps > Small::columns;
}

/* Columns that one block of the moments' kernel takes, and numbers that it leaves of each map. */
constexpr int MOMENTS_COLUMNS = 1024, MOMENTS_NUMBERS = 4;

/* What a product is made of: one of pnn_dtype, or float32 rounded to TF32. */
constexpr int PRODUCT_TF32 = 100;

/* A vector or matrix tensor. */
struct Vector {
  void *data; /* NULL = absent */
  int dtype;
  int64_t step;
};
struct Matrix {
  void *data;
  int dtype;
  int64_t step[2];
};

/* A tensor's dense channels-last copy, [image][pixel][channel] of the computed pixels, and the tensor itself; without
 * channels there is none. */
struct ChannelsLast {
  View from, to;
  int64_t channels;
};
/* Makes the copies of both in one launch (channels_last.cu); of 2 or 4 bytes an element, channels in whole 4 bytes. */
Status run_channels_last(const Layer &layer, const ChannelsLast &x, const ChannelsLast &g, Stream stream);

Status run_forward(const Layer &layer, int product, Stream stream);

/* The same of plain layers in 16-bit types and TF32 on Hopper, where the user has allowed it (forward_wgmma.cu):
 * whether this layer and this device can, and the elements that V's copy takes, which is written first, from `weight`
 * as the user has it, times normalisation's `scale` of each map unless that is NULL. The columns and the depth of
 * forward's products are a group's outputs and maps, those of the input gradient's its maps and outputs. */
bool forward_wgmma_fits(const Layer &layer, int product);
int64_t wgmma_weight_elements(int64_t groups, int64_t columns, int64_t depth);
Status run_forward_wgmma(const Layer &layer, int product, Matrix weight, const double *scale, void *copy,
                         Stream stream);

Status run_input_gradient(const Layer &layer, int product, bool masks, Stream stream);
/* dx of plain layers in 16-bit types and TF32 on Hopper, as run_forward_wgmma (input_gradient_wgmma.cu). */
bool input_gradient_wgmma_fits(const Layer &layer, int product);
Status run_input_gradient_wgmma(const Layer &layer, int product, Matrix weight, const double *scale, void *copy,
                                Stream stream);
Status run_weight_gradient(const Layer &layer, int product, Stream stream);

/* The same of plain layers in 16-bit types and TF32 on Hopper, where the user has allowed it
 * (weight_gradient_wgmma.cu): whether layers of such sizes may be done so, the tiles of one piece and how many blocks
 * run at a time on a large GPU, and whether this layer and this device can. */
struct WgmmaTiles {
  int64_t tiles, blocks;
};
bool weight_gradient_wgmma_may_fit(const Layer &layer, int product);
WgmmaTiles weight_gradient_wgmma_tiles(const Layer &layer);
bool weight_gradient_wgmma_fits(const Layer &layer, int product);
Status run_weight_gradient_wgmma(const Layer &layer, int product, Stream stream);

Status run_moments(const Layer &layer, int dtype, void *parts, Stream stream);

/* Calls visit(kernel, threads, shared memory in bytes) for each kernel of a file, named as in the machine code: for the
 * table of registers and occupancy (tests/cuda/gates.py). */
using Visit = void (*)(const char *kernel, int threads, int64_t shared_bytes);
void list_forward(Visit visit);
void list_forward_wgmma(Visit visit);
void list_input_gradient(Visit visit);
void list_input_gradient_wgmma(Visit visit);
void list_weight_gradient(Visit visit);
void list_weight_gradient_wgmma(Visit visit);
void list_moments(Visit visit);
void list_channels_last(Visit visit);

/* ---- per channel, in double (finish.cu) ---- */

/* Zeros behind the maps' means, which forward reads for depths that are no maps. */
constexpr int NO_MAPS = 16;

/* Normalisation's numbers for each map, doubles. */
struct Norm {
  double *scale, *inverse, *beta; /* gamma * inverse, 1 / sqrt(variance + eps) */
  void *mean;                     /* reals, as the kernels subtract it; NO_MAPS zeros behind */
};

Status run_moments_finish(const Layer &layer, bool is_double, const void *parts, Vector mean, Vector variance,
                          Stream stream);
Status run_norm(const Layer &layer, bool is_double, Vector mean, Vector variance, Vector gamma, Vector beta, double eps,
                Norm norm, Stream stream);
/* weight * scale[k], rounded once, as the kernels read it; scale may be NULL. */
Status run_weight(const Layer &layer, Matrix weight, const double *scale, void *to, Stream stream);
/* start[t] = bias[t] + sum over k of weight * beta */
Status run_start(const Layer &layer, bool is_double, Matrix weight, Vector bias, const double *beta, void *start,
                 Stream stream);
Status run_waves(const Layer &layer, int64_t count, uint32_t *waves, Stream stream);
/* Adds the splits of products and totals up, into the first, and makes it the only one. */
Status run_join(Layer &layer, bool is_double, Stream stream);
/* dV from the products, dbias from the totals, both summed over their splits; with normalisation they must be joined.
 */
Status run_weight_store(const Layer &layer, bool is_double, const Norm *norm, Matrix grad_weight, Vector grad_bias,
                        Stream stream);
/* dgamma, dbeta, and the input gradient's offset and slope where they are not NULL. */
Status run_norm_gradient(const Layer &layer, bool is_double, Matrix weight, Norm norm, Vector grad_gamma,
                         Vector grad_beta, void *offset, void *slope, Stream stream);
/* The sum of the mask's gradient over the channels that share it. */
Status run_mask_join(const Layer &layer, bool is_double, Stream stream);
Status run_clear(const pnn_tensor &tensor, int64_t size, Stream stream);
Status run_mask_fill(const pnn_tensor &mask, int noise, const int64_t *seed, Stream stream);

}  // namespace pnn_cuda

#endif
