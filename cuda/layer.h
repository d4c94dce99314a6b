/*
 * layer.h - one layer's call as the kernels see it: sizes, views, dividers. Built on the host by api.cu from the
 * problem that csrc/check.c checked, handed to each kernel by value.
 *
 * The columns of every product are the computed pixels of all images: column q is pixel q % P of image q / P, P =
 * H'*W'. Indices are 64 bits wide; they are divided by multiplying (Granlund, Montgomery, "Division by invariant
 * integers using multiplication", PLDI 1994), since the hardware has no integer division.
 */
#ifndef PNN_CUDA_LAYER_H
#define PNN_CUDA_LAYER_H

#include "pnn/pnn.h"
#include "ptx.h"

namespace pnn_cuda {

struct Divider {
  uint64_t divisor, multiplier;
  int shift1, shift2;
  uint32_t multiplier32; /* for dividends below 2^31 */
  int shift32;
};

inline Divider divider_make(int64_t divisor) {
  Divider d;
  d.divisor = static_cast<uint64_t>(divisor < 1 ? 1 : divisor);
  int bits = 0; /* the least with 2^bits >= divisor */
  while (bits < 64 && (static_cast<uint64_t>(1) << bits) < d.divisor) bits++;
  __extension__ typedef unsigned __int128 wide;
  d.multiplier = static_cast<uint64_t>(((((static_cast<wide>(1) << bits) - d.divisor) << 64) / d.divisor) + 1);
  d.shift1 = bits < 1 ? 0 : 1;
  d.shift2 = bits < 1 ? 0 : bits - 1;
  /* ceil(2^(31 + bits) / divisor) is below 2^32, and 2n times it is 2^(32 + bits) n / divisor, too large by less than
   * 2^(32 + bits) / divisor: the quotient is exact. */
  d.shift32 = bits < 32 ? bits : 0;
  d.multiplier32 =
      bits < 32 ? static_cast<uint32_t>(((static_cast<uint64_t>(1) << (31 + bits)) + d.divisor - 1) / d.divisor) : 0;
  return d;
}

/* n / divisor and the rest, for n >= 0; BELOW_31: n < 2^31, which takes a fifth of the instructions. */
template <bool BELOW_31 = false>
PNN_DEVICE int64_t divide(const Divider &d, int64_t n, int64_t *rest) {
  if constexpr (BELOW_31) {
    const uint32_t m = static_cast<uint32_t>(n), quotient = multiply_high(d.multiplier32, m + m) >> d.shift32;
    *rest = m - quotient * static_cast<uint32_t>(d.divisor);
    return quotient;
  }
  const uint64_t u = static_cast<uint64_t>(n), t = multiply_high(d.multiplier, u);
  const uint64_t q = (t + ((u - t) >> d.shift1)) >> d.shift2;
  *rest = static_cast<int64_t>(u - q * d.divisor);
  return static_cast<int64_t>(q);
}

/* Element (b, channel, i, j) of the grid of computed pixels stands at data + (b*batch + channel*channel + i*row +
 * j*column) elements. In a mask `batch` is the step from mask to mask of a channel. */
struct View {
  char *data;
  int64_t batch, channel, row, column;
  int dtype;
};

/* How a tile of a tensor travels to shared memory. */
enum Staging {
  STAGE_ELEMENTS = 0, /* element by element: any strides */
  STAGE_PIXELS = 1,   /* 16 bytes at a time along the pixels of a channel (contiguous) */
  STAGE_CHANNELS = 2, /* 16 bytes at a time along the channels of a pixel (channels-last) */
  STAGE_WORDS = 3     /* 4 bytes at a time along the pixels of a channel, laid out as with STAGE_PIXELS */
};
/* Whether a tile lies in shared memory as [channel][column], copied asynchronously. */
PNN_HOST_DEVICE bool along_pixels(int staging) { return staging == STAGE_PIXELS || staging == STAGE_WORDS; }

struct Layer {
  int64_t batch, pixels, columns; /* B, P, B*P */
  int64_t groups, group_channels, group_maps, group_outputs;
  int64_t channels, maps, outputs, masks;
  int64_t stride_row, stride_column;
  Divider by_pixels, by_width, by_masks;
  uint32_t masks_reciprocal; /* 65536 / masks + 1, for up to 32 masks; else 0 */
  int masks_shift;           /* masks = 1 << masks_shift, or -1 */

  View input, mask, output, grad_output, grad_input, grad_mask;
  int input_staging, grad_output_staging, output_staging, grad_input_staging;
  bool input_float; /* float32 beside a 16-bit product */
  bool output_channels_fastest, input_channels_fastest;

  int noise, activation;
  bool shared;
  double level;
  float level_float;
  const int64_t *seed;
  const uint32_t *waves; /* [maps or masks][4]: frequency down, across, phase, 0 */
  const void *mean;      /* [K] reals, from a multiple of 16 bytes on, NO_MAPS zeros behind them; or null */

  /* The product's weights: [groups * group_outputs][weight_step] of the product's type, rows aligned to 16 bytes. */
  const char *weight;
  int64_t weight_step;
  const void *start; /* [T] reals that the sums start from, or null: then the bias */
  const char *bias;  /* [T] of the product's type, or null */
  int64_t bias_step;
  const void *offset, *slope; /* [K] reals each, aligned alike: what training adds to da; or null */

  int64_t splits, split_columns; /* of the weight gradient */
  void *products, *totals;       /* [splits][T][K/G], [splits][T] reals, or null */
  void *mask_parts;              /* [K][P] reals, for shared masks' gradient, or null */
};

/* A map's channel and mask. */
struct Map {
  int64_t c, m;
};

PNN_DEVICE Map map_make(const Layer &layer, int64_t k) {
  Map map;
  map.c = divide(layer.by_masks, k, &map.m);
  return map;
}

/* Moves on by up to 32 maps, without a division. */
PNN_DEVICE void map_advance(const Layer &layer, Map *map, int maps) {
  if (layer.masks == 1) {
    map->c += maps;
    return;
  }
  map->m += maps;
  if (layer.masks_reciprocal == 0) {
    if (map->m >= layer.masks) map->m -= layer.masks, map->c++;
    return;
  }
  const uint32_t m = static_cast<uint32_t>(map->m), masks = static_cast<uint32_t>(layer.masks);
  const uint32_t channels = m * layer.masks_reciprocal >> 16; /* exact below 64 */
  map->c += channels;
  map->m = m - channels * masks;
}

/* Where a column's pixel stands. */
struct Place {
  int64_t image, pixel;
  int64_t i, j; /* of the grid of computed pixels */
};

template <bool BELOW_31 = false>
PNN_DEVICE Place place_make(const Layer &layer, int64_t column) {
  Place p;
  p.image = divide<BELOW_31>(layer.by_pixels, column, &p.pixel);
  p.i = divide<BELOW_31>(layer.by_width, p.pixel, &p.j);
  return p;
}
PNN_DEVICE int64_t place_in(const View &v, const Place &p) { return p.image * v.batch + p.i * v.row + p.j * v.column; }

template <class D>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

/* One element as real. Float beside 16-bit types is chosen at run time, the type D at compile time. */
template <class D>
PNN_DEVICE typename RealOf<D>::type element(const char *data, int64_t at, bool is_float) {
  if constexpr (sizeof(D) == 2) {
    if (is_float) return reinterpret_cast<const float *>(data)[at];
  }
  if constexpr (sizeof(D) == 8) {
    if (is_float) return reinterpret_cast<const float *>(data)[at];
  }
  return widen(reinterpret_cast<const D *>(data)[at]);
}

}  // namespace pnn_cuda

#endif
