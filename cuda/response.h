/*
 * response.h - response maps in registers: masks from their tensor or their seed, perturbation, activation, centring.
 *
 * A thread makes eight neighbouring maps of one pixel at a time. The 256-value lattice takes one Philox call for
 * sixteen maps (csrc/kernels/philox.h, the same generator): threads that go through two runs of eight keep its words
 * for the second. Runs that start at no multiple of eight are made map by map.
 */
#ifndef PNN_CUDA_RESPONSE_H
#define PNN_CUDA_RESPONSE_H

#include <type_traits>

#include "activation.h"
#include "layer.h"
#include "tile.h"

namespace pnn_cuda {

constexpr int RUN = 8; /* maps that a thread makes at a time */

/* Philox4x32-10 of the counter w, in place (Salmon et al., SC 2011). */
PNN_DEVICE void philox_round(uint32_t w[4], uint32_t k0, uint32_t k1) {
  const uint64_t a = uint64_t{0xD2511F53u} * w[0], b = uint64_t{0xCD9E8D57u} * w[2];
  w[0] = static_cast<uint32_t>(b >> 32) ^ w[1] ^ k0;
  w[1] = static_cast<uint32_t>(b);
  w[2] = static_cast<uint32_t>(a >> 32) ^ w[3] ^ k1;
  w[3] = static_cast<uint32_t>(a);
}
PNN_DEVICE void philox(uint32_t w[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    philox_round(w, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

/* The rounds' keys, for a thread that has registers to keep them in: 18 additions less to a call. */
struct PhiloxKeys {
  uint32_t of[10][2];
};
PNN_DEVICE PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    keys.of[round][0] = keep(k0);
    keys.of[round][1] = keep(k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return keys;
}
PNN_DEVICE void philox(uint32_t w[4], const PhiloxKeys &keys) {
#pragma unroll
  for (int round = 0; round < 10; round++) philox_round(w, keys.of[round][0], keys.of[round][1]);
}

/* Two pixels' calls in one: they share the keys, which have no registers of their own. */
PNN_DEVICE void philox_both(uint32_t words[2][4], uint64_t seed) {
  uint32_t k0 = keep(static_cast<uint32_t>(seed)), k1 = keep(static_cast<uint32_t>(seed >> 32));
#pragma unroll
  for (int round = 0; round < 10; round++) {
#pragma unroll
    for (int p = 0; p < 2; p++) philox_round(words[p], k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

/* Philox for COUNT pixels, or sixteens of maps, at once, with the keys of every EVERYth round in registers: for the
 * others one addition serves all. */
template <int EVERY>
struct PairKeys {
  static_assert(10 % EVERY == 0, "whole groups of rounds");
  uint32_t of[10 / EVERY][2];
  PNN_DEVICE explicit PairKeys(uint64_t seed) {
    const PhiloxKeys keys = philox_keys(seed);
#pragma unroll
    for (int i = 0; i < 10 / EVERY; i++) of[i][0] = keys.of[i * EVERY][0], of[i][1] = keys.of[i * EVERY][1];
  }
  template <int COUNT = 2>
  PNN_DEVICE void philox(uint32_t (&words)[2][4]) const {
    uint32_t key[2] = {};
#pragma unroll
    for (int round = 0; round < 10; round++) {
      key[0] = round % EVERY ? keep(key[0]) + 0x9E3779B9u : of[round / EVERY][0];
      key[1] = round % EVERY ? keep(key[1]) + 0xBB67AE85u : of[round / EVERY][1];
#pragma unroll
      for (int p = 0; p < COUNT; p++) philox_round(words[p], key[0], key[1]);
    }
  }
};

/* (2u - 255) / 256 for a byte, exactly: 256 + (2u + 1) / 256 by its bits, of which u is the second byte, then one
 * subtraction. */
PNN_DEVICE float lattice(uint32_t byte) { return float_of(0x43800080u | byte << 8) - 257.0f; }
/* The same of byte i of a word; `constant` is for a thread that has it in a register. */
constexpr uint32_t LATTICE = 0x43800080u;
PNN_DEVICE float lattice_in(uint32_t word, int i, uint32_t constant = LATTICE) {
  return float_of(permute(word, constant, 0x7604u | static_cast<uint32_t>(i) << 4)) - 257.0f;
}

PNN_DEVICE uint32_t byte_sum(uint32_t a, uint32_t b) {
  const uint32_t pairs = (a & 0xff00ffu) + (a >> 8 & 0xff00ffu) + (b & 0xff00ffu) + (b >> 8 & 0xff00ffu);
  return (pairs & 0xffffu) + (pairs >> 16);
}

PNN_DEVICE uint32_t wave_frequency(uint32_t word) {
  const uint32_t m = ((1u << 29) + (word >> 3)) >> (word % 4);
  return word & 4 ? 0u - m : m;
}

/* One map's wave: frequency down, frequency across, phase. */
PNN_DEVICE void wave_make(uint64_t seed, uint32_t k, uint32_t wave[4]) {
  uint32_t w[4] = {k, 0, 0, 1};
  philox(w, seed);
  wave[0] = wave_frequency(w[0]);
  wave[1] = wave_frequency(w[1]);
  wave[2] = w[2];
  wave[3] = 0;
}

PNN_DEVICE float wave_value(uint32_t down, uint32_t across, uint32_t phase, uint32_t row, uint32_t column) {
  const uint32_t t = (down * row + across * column + phase) >> 23;
  return lattice(t < 256 ? t : 511 - t);
}

/* The recipe's value for map k at a pixel of the full grid, one by one; `words` and `*made` keep the last generator
 * call for the next map. */
PNN_DEVICE float recipe_value(const Layer &layer, uint64_t seed, uint32_t k, uint32_t row, uint32_t column,
                              uint32_t words[4], uint32_t *made) {
  if (layer.noise == PNN_NOISE_WAVES) {
    const uint32_t *wave = layer.waves + static_cast<int64_t>(k) * 4;
    return wave_value(wave[0], wave[1], wave[2], row, column);
  }
  const bool normal = layer.noise == PNN_NOISE_NORMAL;
  const uint32_t block = normal ? k / 2 : k / 16;
  if (*made != block) {
    *made = block;
    words[0] = column;
    words[1] = row;
    words[2] = block;
    words[3] = normal ? 2 : 0;
    philox(words, seed);
  }
  if (normal) {
    const uint32_t sum = k % 2 ? byte_sum(words[2], words[3]) : byte_sum(words[0], words[1]);
    return static_cast<float>(static_cast<int>(sum) - 1020) * 0x1.39897ep-8f;
  }
  const uint32_t w = k / 4 % 4, word = w == 0 ? words[0] : w == 1 ? words[1] : w == 2 ? words[2] : words[3];
  return lattice(word >> (k % 4 * 8) & 0xff);
}

constexpr uint32_t NOTHING_MADE = 0xffffffffu; /* no block's number: maps / 16 stays below */

/* A pixel as the masks see it. */
struct Pixel {
  int64_t mask;         /* offset in the mask tensor */
  uint32_t row, column; /* on the input's full grid, as the generator counts */
};

PNN_DEVICE Pixel pixel_make(const Layer &layer, const Place &p) {
  Pixel pixel;
  pixel.mask = p.i * layer.mask.row + p.j * layer.mask.column;
  pixel.row = static_cast<uint32_t>(p.i * layer.stride_row);
  pixel.column = static_cast<uint32_t>(p.j * layer.stride_column);
  return pixel;
}

/* What the generator gave last: sixteen maps of one pixel. */
struct Generated {
  uint32_t words[4], block;
};
PNN_DEVICE Generated nothing_generated() { return {{0, 0, 0, 0}, NOTHING_MADE}; }

/* n[e] = fl(fl(level) * N) of the maps k + e, e < count, at the pixel; `map` is map k. */
template <class R>
PNN_DEVICE void noise_make(const Layer &layer, uint64_t seed, int64_t k, Map map, int count, const Pixel &pixel,
                           bool mask_float, Generated *last, R n[RUN]) {
  R level;
  if constexpr (sizeof(R) == 8)
    level = layer.level;
  else
    level = layer.level_float;
  if (layer.noise == PNN_NOISE_UNIFORM && !layer.shared && k % RUN == 0) {
    const uint32_t block = static_cast<uint32_t>(k / 16);
    if (last->block != block) {
      last->block = block;
      last->words[0] = pixel.column;
      last->words[1] = pixel.row;
      last->words[2] = block;
      last->words[3] = 0;
      philox(last->words, seed);
    }
    const bool upper = k % 16 != 0;
    const uint32_t low = upper ? last->words[2] : last->words[0], high = upper ? last->words[3] : last->words[1];
#pragma unroll
    for (int e = 0; e < RUN; e++) n[e] = level * static_cast<R>(lattice_in(e < 4 ? low : high, e % 4));
    return;
  }
  if (layer.noise == PNN_NOISE_TENSOR && layer.masks == 1) {
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      n[e] = 0;
      if (e < count) {
        const int64_t at = pixel.mask + (layer.shared ? 0 : (map.c + e) * layer.mask.channel);
        if constexpr (sizeof(R) == 8)
          n[e] = level * element<double>(layer.mask.data, at, mask_float);
        else if (mask_float)
          n[e] = level * reinterpret_cast<const float *>(layer.mask.data)[at];
        else if (layer.mask.dtype == PNN_BFLOAT16)
          n[e] = level * widen(reinterpret_cast<const bfloat16 *>(layer.mask.data)[at]);
        else
          n[e] = level * widen(reinterpret_cast<const float16 *>(layer.mask.data)[at]);
      }
    }
    return;
  }
  /* Map by map; the registers move up by one each time, so that no index into them depends on the loop. */
  uint32_t words[4], made = NOTHING_MADE;
#pragma unroll
  for (int e = 0; e < RUN; e++) n[e] = 0;
#pragma unroll 1
  for (int e = 0; e < RUN; e++) {
    R value = 0;
    if (e < count) {
      if (layer.noise == PNN_NOISE_TENSOR) {
        const int64_t at = pixel.mask + (layer.shared ? 0 : map.c * layer.mask.channel) + map.m * layer.mask.batch;
        if constexpr (sizeof(R) == 8)
          value = element<double>(layer.mask.data, at, mask_float);
        else if (mask_float)
          value = reinterpret_cast<const float *>(layer.mask.data)[at];
        else if (layer.mask.dtype == PNN_BFLOAT16)
          value = widen(reinterpret_cast<const bfloat16 *>(layer.mask.data)[at]);
        else
          value = widen(reinterpret_cast<const float16 *>(layer.mask.data)[at]);
      } else {
        value = static_cast<R>(recipe_value(layer, seed, static_cast<uint32_t>(layer.shared ? map.m : k + e), pixel.row,
                                            pixel.column, words, &made));
      }
      value = level * value;
      if (++map.m == layer.masks) map.m = 0, map.c++;
    }
#pragma unroll
    for (int i = 0; i + 1 < RUN; i++) n[i] = n[i + 1];
    n[RUN - 1] = value;
  }
}

/* An input pixel's channels: a tile's in shared memory, with steps that fit an int, or the tensor itself. */
template <class Step>
struct Source {
  const char *data; /* of the first map's channel */
  Step step;        /* bytes from channel to channel */
};

/* Element e of 16 bytes. */
PNN_DEVICE float element_in(float, const words4 &words, int e) { return float_of(words.w[e]); }
PNN_DEVICE tf32 element_in(tf32, const words4 &words, int e) { return {float_of(words.w[e])}; }
PNN_DEVICE double element_in(double, const words4 &words, int e) {
  return double_of(static_cast<uint64_t>(words.w[2 * e + 1]) << 32 | words.w[2 * e]);
}
template <class E>
PNN_DEVICE E element_in(E, const words4 &words, int e) {
  return {static_cast<uint16_t>(words.w[e / 2] >> (e % 2 * 16))};
}

/* Adds x to u, or writes it there; `left` maps of the first channel are still to come. E is x's type. */
template <class E, class R, class Step>
PNN_DEVICE void input_add(const Source<Step> &x, int masks, int left, int count, bool noise, R u[RUN]) {
  const char *at = x.data;
  if constexpr (sizeof(Step) == 4) {
    if (masks == 1 && count == RUN && x.step == static_cast<int>(sizeof(E))) { /* channels in a row, 16 bytes aligned */
      constexpr int V = 16 / static_cast<int>(sizeof(E));
#pragma unroll
      for (int i = 0; i < RUN; i += V) {
        const words4 words = load_shared(reinterpret_cast<const words4 *>(at) + i / V);
#pragma unroll
        for (int e = 0; e < V; e++) {
          const R v = static_cast<R>(widen(element_in(E{}, words, e)));
          u[i + e] = noise ? v + u[i + e] : v;
        }
      }
      return;
    }
  }
  if (masks == 1 && count == RUN) {
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      const R v = static_cast<R>(widen(*reinterpret_cast<const E *>(at)));
      if (sizeof(Step) == 4) note_load(at, sizeof(E));
      u[e] = noise ? v + u[e] : v;
      at += x.step;
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < RUN; e++) {
    if (e < count) {
      const R v = static_cast<R>(widen(*reinterpret_cast<const E *>(at)));
      if (sizeof(Step) == 4) note_load(at, sizeof(E));
      u[e] = noise ? v + u[e] : v;
      if (--left == 0) left = masks, at += x.step;
    } else {
      u[e] = 0;
    }
  }
}

/* u[e] = the perturbed input of map k + e, e < count (0 beyond), for maps that start at k of the layer, which is `map`;
 * x's data are those of its channel. */
template <class D, class Step, class R = typename RealOf<D>::type>
PNN_DEVICE void perturbed(const Layer &layer, uint64_t seed, const Source<Step> &x, int64_t k, Map map, int count,
                          const Pixel &pixel, Generated *last, R u[RUN]) {
  const bool noise = layer.noise != PNN_NOISE_NONE;
  if (noise) noise_make(layer, seed, k, map, count, pixel, layer.mask.dtype == PNN_FLOAT32, last, u);
  constexpr int64_t MOST = 1 << 30; /* more than a run */
  const int masks = static_cast<int>(layer.masks < MOST ? layer.masks : MOST);
  const int left = static_cast<int>(layer.masks - map.m < MOST ? layer.masks - map.m : MOST);
  if constexpr (sizeof(D) == 2) {
    if (layer.input_float) {
      input_add<float>(x, masks, left, count, noise, u);
      return;
    }
  }
  input_add<D>(x, masks, left, count, noise, u);
}

/* The source that reads the tensor itself; `at` is the pixel's place in it. */
template <class D>
PNN_DEVICE Source<int64_t> source_in(const Layer &layer, int64_t at, int64_t channel) {
  const int size = layer.input_float ? 4 : static_cast<int>(sizeof(D));
  return {layer.input.data + (at + channel * layer.input.channel) * size, layer.input.channel * size};
}

/* u = activation(u). The costly ones go one at a time through the same registers: eight copies of each would make the
 * kernels eight times as long. */
template <class R>
PNN_DEVICE void activate_run(int activation, R u[RUN]) {
  if (activation == PNN_ACTIVATION_RELU) {
#pragma unroll
    for (int e = 0; e < RUN; e++) u[e] = u[e] < 0 ? R(0) : u[e];
    return;
  }
#pragma unroll 1
  for (int e = 0; e < RUN; e++) {
    const R a = activate(activation, u[0]);
#pragma unroll
    for (int i = 0; i + 1 < RUN; i++) u[i] = u[i + 1];
    u[RUN - 1] = a;
  }
}

/* d = activation'(u) * d. */
template <class R>
PNN_DEVICE void activate_gradient_run(int activation, R u[RUN], R d[RUN]) {
  if (activation == PNN_ACTIVATION_RELU) {
#pragma unroll
    for (int e = 0; e < RUN; e++) d[e] = u[e] <= 0 ? R(0) : d[e];
    return;
  }
#pragma unroll 1
  for (int e = 0; e < RUN; e++) {
    const R u0 = u[0], a = activate_gradient(activation, u0, d[0]);
#pragma unroll
    for (int i = 0; i + 1 < RUN; i++) u[i] = u[i + 1], d[i] = d[i + 1];
    u[RUN - 1] = u0;
    d[RUN - 1] = a;
  }
}

/* From u to the product's operand, unrounded: activation, minus the mean; 0 beyond count. */
template <class R>
PNN_DEVICE void respond(const Layer &layer, int64_t k, int count, R u[RUN]) {
  activate_run(layer.activation, u);
  if (layer.mean) {
    const R *mean = static_cast<const R *>(layer.mean) + k;
#pragma unroll
    for (int e = 0; e < RUN; e++)
      if (e < count) u[e] = u[e] - mean[e];
  }
  if (count == RUN) return;
#pragma unroll
  for (int e = 0; e < RUN; e++)
    if (e >= count) u[e] = 0;
}

/* Most layers have the 256-value lattice from a seed, relu, maps in whole sixteens, one mask or a power of two to a
 * channel, and x in runs of 16 bytes: they have kernels of their own, in which operands are made without a bound or a
 * register that moves, and with no branch but that of normalisation. The bits are those of the way above. */
enum Way { ANY_WAY, PLAIN_PIXELS, PLAIN_CHANNELS };

template <class D>
bool is_plain(const Layer &layer) {
  return sizeof(D) < 8 && layer.noise == PNN_NOISE_UNIFORM && !layer.shared && layer.group_maps % 16 == 0 &&
         layer.columns < INT32_MAX - 128 && layer.outputs * layer.maps < INT32_MAX - 128 &&
         (layer.columns / 64 + 1) * (layer.outputs > layer.maps ? layer.outputs : layer.maps) < INT32_MAX &&
         layer.activation == PNN_ACTIVATION_RELU && !layer.input_float && layer.masks_shift >= 0;
}
template <class D>
Way way_of(const Layer &layer) {
  if (!is_plain<D>(layer)) return ANY_WAY;
  if (layer.input_staging == STAGE_PIXELS) return PLAIN_PIXELS;
  return layer.input_staging == STAGE_CHANNELS && layer.group_channels % Depth<D>::vector == 0 ? PLAIN_CHANNELS
                                                                                               : ANY_WAY;
}

constexpr int SIXTEEN = 16; /* maps of a pixel that a thread of a plain layer makes at a time: a Philox call's */

/* f(a constant with the masks of a channel), of as many as share sixteen maps; with CHANNELS eight at most. */
template <bool CHANNELS, class F>
PNN_DEVICE void with_masks(int shift, F f) {
  if (shift == 0)
    f(std::integral_constant<int, 1>());
  else if (shift == 1)
    f(std::integral_constant<int, 2>());
  else if (shift == 2)
    f(std::integral_constant<int, 4>());
  else if (CHANNELS || shift == 3)
    f(std::integral_constant<int, 8>());
  else if constexpr (!CHANNELS)
    f(std::integral_constant<int, 16>());
}

/* x of sixteen maps with MASKS to a channel, from shared memory; channels are `step` bytes apart, side by side with
 * VECTOR. */
template <class D, int MASKS, bool VECTOR>
PNN_DEVICE void plain_input(const char *x, int step, float v[SIXTEEN]) {
  constexpr int SIZE = static_cast<int>(sizeof(D)), V = 16 / SIZE;
  if constexpr (VECTOR && MASKS == 1) {
#pragma unroll
    for (int i = 0; i < SIXTEEN; i += V) {
      const words4 vector = load_shared(reinterpret_cast<const words4 *>(x) + i / V);
#pragma unroll
      for (int e = 0; e < V; e++) v[i + e] = static_cast<float>(widen(element_in(D{}, vector, e)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < SIXTEEN; i += MASKS, x += step) {
      const float value = static_cast<float>(widen(*reinterpret_cast<const D *>(x)));
      note_load(x, SIZE);
#pragma unroll
      for (int e = 0; e < MASKS; e++) v[i + e] = value;
    }
  }
}

/* The perturbed input of the sixteen maps with number `block`, of one pixel; x is their first channel's. */
template <class D, bool VECTOR>
PNN_DEVICE void plain_perturbed(const Layer &layer, const PhiloxKeys &keys, uint32_t block, uint32_t row,
                                uint32_t column, const char *x, int step, float u[SIXTEEN]) {
  uint32_t words[4] = {column, row, block, 0};
  philox(words, keys);
  const int shift = layer.masks_shift;
  if (shift == 0)
    plain_input<D, 1, VECTOR>(x, step, u);
  else if (shift == 1)
    plain_input<D, 2, VECTOR>(x, step, u);
  else if (shift == 2)
    plain_input<D, 4, VECTOR>(x, step, u);
  else if (shift == 3)
    plain_input<D, 8, VECTOR>(x, step, u);
  else
    plain_input<D, 16, VECTOR>(x, step, u);
#pragma unroll
  for (int e = 0; e < SIXTEEN; e++) u[e] = u[e] + layer.level_float * lattice_in(words[e / 4], e % 4);
}

/* Of numbers that each map has one of, in device memory: those of four maps from `map` on, a multiple of four. */
struct Four {
  float of[4];
};
PNN_DEVICE Four four_from(const void *numbers, uint32_t map) {
  const words4 w = load_global(reinterpret_cast<const words4 *>(static_cast<const float *>(numbers) + map));
  return {{float_of(w.w[0]), float_of(w.w[1]), float_of(w.w[2]), float_of(w.w[3])}};
}

/* Their response to shared memory as D; x is there too, its channels STEP bytes apart. */
template <class D, int STEP>
PNN_DEVICE void plain_response(const Layer &layer, const PhiloxKeys &keys, uint32_t block, uint32_t row,
                               uint32_t column, const char *x, D *to) {
  float u[SIXTEEN];
  plain_perturbed<D, STEP == static_cast<int>(sizeof(D))>(layer, keys, block, row, column, x, STEP, u);
  if (!layer.mean) {
    store_run_relu(to, u);
    store_run_relu(to + RUN, u + RUN);
    return;
  }
#pragma unroll
  for (int i = 0; i < SIXTEEN; i += 4) {
    const Four mean = four_from(layer.mean, block * SIXTEEN + static_cast<uint32_t>(i));
#pragma unroll
    for (int e = 0; e < 4; e++) {
      /* As in store_run_relu, which zero it is means something to float32's chains alone. */
      float &v = u[i + e];
      if constexpr (std::is_same_v<D, float>)
        v = v < 0 ? 0.0f : v;
      else
        v = relu_any_zero(v);
      v -= mean.of[e];
    }
  }
  store_run(to, u);
  store_run(to + RUN, u + RUN);
}

PNN_DEVICE uint64_t seed_read(const Layer &layer) { return layer.seed ? static_cast<uint64_t>(*layer.seed) : 0; }

}  // namespace pnn_cuda

#endif
