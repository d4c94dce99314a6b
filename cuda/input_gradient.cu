/*
 * input_gradient.cu - dx and dN: da = V'g, then through the activation's derivative.
 *
 *     da[k,q] = sum over t of V[t,k] g[t,q]            (V with normalisation's scale in it)
 *     d[k,q]  = activation'(u[k,q]) * (da + offset[k] + slope[k]*c[k,q])      offset, slope: normalisation in training
 *     dx[c,q] = sum over m of d        or, in a launch of its own where masks are trained,
 *     dN[k,p] = level * sum over b of d
 *
 * Both operands travel as they are stored, four steps of depth (outputs) at a time: V as [output][map], read
 * transposed; g as [output][pixel] (transposed) or, channels-last, as [pixel][output]. The sums go through shared
 * memory into runs of eight maps of a pixel, where u is made again from x as the forward pass did; d returns there to
 * be added up over m. Plain layers (response.h) whose x and dx are channels-last keep the sums as [pixel][map], so that
 * a thread's maps are vectors, and add them up over m before they return.
 *
 * A block's maps are those of whole channels; they start at a multiple of 16 bytes, so the tile may begin a few maps
 * early. A channel with more maps than a tile is taken in pieces, its sum waiting in a register. For dN a block keeps
 * its pixels and goes through the batch. Every sum has one order, whatever the grid.
 */
#include <string>

#include "kernels.h"
#include "response.h"
#include "tile.h"

namespace pnn_cuda {
namespace {

constexpr int STAGES = 4;

struct Column {
  int64_t input, grad_output, grad_input;
  Pixel pixel;
};

/* What a launch adds to the layer. */
struct Grid {
  int64_t first_tile;
  Divider by_maps, by_columns;
  int64_t channels;     /* of a tile; 0 = the mask's gradient */
  int64_t column_tiles; /* of an image, for the mask's gradient */
  bool channel_vectors; /* dx is channels-last, a tile's channels of a pixel are whole runs of 16 bytes */
};

template <class D, class S, Fastest G>
struct Shape {
  using R = typename RealOf<D>::type;
  static constexpr int DEPTH = Depth<D>::value;
  static constexpr int weight_bytes = bytes_of<D>(ROWS_FASTEST, S::rows);
  static constexpr int gradient_bytes = bytes_of<D>(G, S::columns);
  static constexpr int stage_bytes = weight_bytes + gradient_bytes;
  static constexpr int table_bytes = S::columns * static_cast<int>(sizeof(Column));
  static constexpr int pitch = S::columns + 8, pitch_maps = S::rows + 4; /* of [map][pixel] and of [pixel][map] */
  static constexpr int sums_bytes = S::rows * pitch * static_cast<int>(sizeof(R));
  static_assert(S::columns * pitch_maps <= S::rows * pitch, "either order has room");
  static constexpr int work_bytes = STAGES * stage_bytes > sums_bytes ? STAGES *stage_bytes : sums_bytes;
  static constexpr int bytes = table_bytes + work_bytes;
  static constexpr int mask_bytes = bytes + sums_bytes;
};

/* x of sixteen maps of a plain layer, on its way from device memory: asked for early, widened late. The channels are
 * `step` bytes apart. */
template <class D, bool SIDE_BY_SIDE>
struct InputOnItsWay {
  D x[SIXTEEN] = {};
  template <int MASKS>
  PNN_DEVICE void ask(const char *from, int64_t step) {
#pragma unroll
    for (int c = 0; c < SIXTEEN / MASKS; c++, from += step) x[c] = *reinterpret_cast<const D *>(from);
  }
  PNN_DEVICE float channel(int c) const { return static_cast<float>(widen(x[c])); }
};
/* Channels side by side: the sixteen maps' begin at a multiple of their bytes, of 16 at most. */
template <class D>
struct InputOnItsWay<D, true> {
  static constexpr int SIZE = static_cast<int>(sizeof(D)), V = 16 / SIZE;
  words4 x[SIXTEEN / V] = {};
  template <int MASKS>
  PNN_DEVICE void ask(const char *from, int64_t) {
    constexpr int BYTES = SIXTEEN / MASKS * SIZE;
    if constexpr (BYTES >= 16) {
#pragma unroll
      for (int i = 0; i < BYTES / 16; i++) x[i] = load_global(reinterpret_cast<const words4 *>(from) + i);
    } else if constexpr (BYTES == 8) {
      const uint64_t bits = *reinterpret_cast<const uint64_t *>(from);
      x[0].w[0] = static_cast<uint32_t>(bits);
      x[0].w[1] = static_cast<uint32_t>(bits >> 32);
    } else {
      static_assert(BYTES == 4, "two 16-bit channels");
      x[0].w[0] = *reinterpret_cast<const uint32_t *>(from);
    }
  }
  PNN_DEVICE float channel(int c) const { return static_cast<float>(widen(element_in(D{}, x[c / V], c % V))); }
};

/* The sums of d over each MASKS of sixteen maps to shared memory. */
template <int MASKS>
PNN_DEVICE void store_sums(float *to, const float d[SIXTEEN]) {
  constexpr int COUNT = SIXTEEN / MASKS;
  float sum[COUNT];
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    sum[c] = d[c * MASKS];
#pragma unroll
    for (int m = 1; m < MASKS; m++) sum[c] += d[c * MASKS + m];
  }
  if constexpr (COUNT >= 4) {
#pragma unroll
    for (int c = 0; c < COUNT; c += 4)
      store_shared_whole(reinterpret_cast<words4 *>(to + c),
                         words4{{bits_of(sum[c]), bits_of(sum[c + 1]), bits_of(sum[c + 2]), bits_of(sum[c + 3])}});
  } else {
#pragma unroll
    for (int c = 0; c < COUNT; c++) to[c] = sum[c];
  }
}

/* da = da + offset + slope * c of four maps from `map` on, in training: c is their centred response, relu's derivative
 * comes after. */
template <class D>
PNN_DEVICE void add_affine(const Layer &layer, uint32_t map, const float u[4], float da[4]) {
  const Four mean = four_from(layer.mean, map), offset = four_from(layer.offset, map),
             slope = four_from(layer.slope, map);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    float c = u[e] - mean.of[e]; /* where u is not above 0, da means nothing */
    if constexpr (sizeof(D) == 2) c = widen(round_to(D{}, c));
    da[e] = fma_(slope.of[e], c, da[e] + offset.of[e]);
  }
}

/* From da to d in plain layers (response.h), for SHARE maps of a pixel from k on, `count` of which are there; `d` is
 * the first one's. With PLAIN_CHANNELS their sums over each channel's masks, channel by channel. */
template <class D, Way WAY, int SHARE, int PITCH>
PNN_DEVICE void plain_gradient(const Layer &layer, const PhiloxKeys &keys, int64_t group, uint32_t k, int count,
                               const Column &column, float *d) {
  constexpr bool CHANNELS = WAY == PLAIN_CHANNELS;
  const int64_t size = static_cast<int64_t>(sizeof(D)), step = CHANNELS ? size : layer.input.channel * size;
  const char *const x = layer.input.data + column.input * size + group * layer.group_channels * step;
  const uint32_t block = static_cast<uint32_t>(group * layer.group_maps / 16) + k / 16;
  const int shift = layer.masks_shift;
#pragma unroll 1
  for (int run = 0; run < SHARE && run < count; run += SIXTEEN) {
    const char *const from = x + static_cast<int64_t>((k + static_cast<uint32_t>(run)) >> shift) * step;
    InputOnItsWay<D, CHANNELS> input;
    with_masks<CHANNELS>(shift, [&](auto masks) { input.template ask<decltype(masks)::value>(from, step); });
    const uint32_t here = block + static_cast<uint32_t>(run / SIXTEEN);
    uint32_t words[4] = {column.pixel.column, column.pixel.row, here, 0};
    philox(words, keys);
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = keep(words[i]); /* before x is waited for */
    float u[SIXTEEN];
    with_masks<CHANNELS>(shift, [&](auto masks) {
#pragma unroll
      for (int e = 0; e < SIXTEEN; e++) u[e] = input.channel(e / decltype(masks)::value);
    });
#pragma unroll
    for (int e = 0; e < SIXTEEN; e++) u[e] = u[e] + layer.level_float * lattice_in(words[e / 4], e % 4);
    if constexpr (CHANNELS) {
#pragma unroll
      for (int i = 0; i < SIXTEEN; i += 4) {
        const words4 four = load_shared(reinterpret_cast<const words4 *>(d + run + i));
        float da[4];
#pragma unroll
        for (int e = 0; e < 4; e++) da[e] = float_of(four.w[e]);
        if (layer.slope) add_affine<D>(layer, here * SIXTEEN + static_cast<uint32_t>(i), u + i, da);
#pragma unroll
        for (int e = 0; e < 4; e++) u[i + e] = u[i + e] <= 0 ? 0.0f : da[e];
      }
      /* Where this thread has read already. */
      with_masks<true>(shift, [&](auto masks) { store_sums<decltype(masks)::value>(d + (run >> shift), u); });
    } else {
#pragma unroll
      for (int i = 0; i < SIXTEEN; i += 4) {
        float da[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          da[e] = d[(run + i + e) * PITCH];
          note_load(d + (run + i + e) * PITCH, sizeof(float));
        }
        if (layer.slope) add_affine<D>(layer, here * SIXTEEN + static_cast<uint32_t>(i), u + i, da);
#pragma unroll
        for (int e = 0; e < 4; e++) d[(run + i + e) * PITCH] = u[i + e] <= 0 ? 0.0f : da[e];
      }
    }
  }
}

/* Sends for x of a tile of a plain layer, to the L2 cache, 32 bytes at a time: it is read after the product. The tile's
 * maps are [k, k_end). */
template <class D, class S, Way WAY>
PNN_DEVICE void prefetch_input(const Layer &layer, const Column *table, int columns, int64_t group, uint32_t k,
                               uint32_t k_end) {
  constexpr int SIZE = static_cast<int>(sizeof(D)), SECTOR = 32;
  const int thread = keep(thread_index()), first = static_cast<int>(k >> layer.masks_shift);
  const int channels = static_cast<int>((k_end - 1) >> layer.masks_shift) + 1 - first;
  const char *from = layer.input.data;
  if constexpr (WAY == PLAIN_CHANNELS) {
    static_assert(S::threads == 2 * S::columns, "two threads to a pixel");
    if (thread / 2 >= columns) return;
    from += (table[thread / 2].input + group * layer.group_channels + first) * SIZE;
#pragma unroll 1
    for (int at = thread % 2 * SECTOR; at < channels * SIZE; at += 2 * SECTOR) prefetch_global(from + at);
  } else if (layer.input_staging == STAGE_PIXELS) {
    constexpr int SECTORS = S::columns * SIZE / SECTOR, STEP = S::threads / SECTORS;
    const int pixel = thread % SECTORS * (SECTOR / SIZE), step = thread / SECTORS;
    if (pixel >= columns) return;
    from += (table[pixel].input + (group * layer.group_channels + first + step) * layer.input.channel) * SIZE;
#pragma unroll 1
    for (int c = step; c < channels; c += STEP, from += STEP * layer.input.channel * SIZE) prefetch_global(from);
  }
}

/* g of a step's outputs, in layers of any kind and in plain ones. */
template <class D, class S, Fastest G>
struct AnyGradient {
  const Layer &layer;
  const Column *table;
  int columns;
  int64_t output_first;
  PNN_DEVICE AnyGradient(const Layer &layer_, const Column *table_, int columns_, int64_t group)
      : layer(layer_), table(table_), columns(columns_), output_first(group * layer_.group_outputs) {}
  PNN_DEVICE void load(int64_t step, char *tile) const {
    const int own = layer.grad_output_staging;
    const int staging = G == DEPTH_FASTEST ? STAGE_CHANNELS : along_pixels(own) ? own : STAGE_ELEMENTS;
    const auto place = [&](int j, int64_t *at) {
      *at = j < columns ? table[j].grad_output : 0;
      return j < columns;
    };
    stage_view<sizeof(D), Depth<D>::value, S::columns, S::threads>(layer.grad_output, staging, step * Depth<D>::value,
                                                                   Depth<D>::value, layer.group_outputs, output_first,
                                                                   tile, pitch_of<D>(G, S::columns), place);
  }
};
template <class D, class S, Fastest G>
struct PlainGradient {
  StepTiles<D, S::columns, S::threads, G == ROWS_FASTEST> tiles;
  PNN_DEVICE PlainGradient(const Layer &layer, const Column *table, int columns, int64_t group)
      : tiles(layer.grad_output, group * layer.group_outputs, layer.group_outputs, Depth<D>::value, columns,
              pitch_of<D>(G, S::columns), [&](int at) { return table[at].grad_output; }) {}
  PNN_DEVICE void load(int step, char *tile) const { tiles.load(step * Depth<D>::value, tile); }
};

/* The plain ways: the input's gradient of a plain layer, with g in runs of 16 bytes. PLAIN_CHANNELS: x and dx as well,
 * channels-last, up to eight masks to a channel. PLAIN_PIXELS: x and dx of any layout. */
template <class D, class S, Fastest G, Way WAY>
__global__ void __launch_bounds__(S::threads, (blocks_of<D, S, (WAY != ANY_WAY)>))
    input_gradient_kernel(const __grid_constant__ Layer layer, const __grid_constant__ Grid grid) {
  using H = Shape<D, S, G>;
  using R = typename H::R;
  constexpr int DEPTH = H::DEPTH;
  constexpr bool PLAIN = WAY != ANY_WAY;
  PNN_SHARED_MEMORY(memory);
  Column *const table = reinterpret_cast<Column *>(memory);
  char *const pipeline = memory + H::table_bytes;
  R *const sums = reinterpret_cast<R *>(pipeline);
  R *const mask_sums = reinterpret_cast<R *>(memory + H::bytes);
  const int thread = thread_index();
  const bool masks = !PLAIN && grid.channels == 0;
  const uint64_t seed = seed_read(layer);
  const PhiloxKeys keys = PLAIN ? philox_keys(seed) : PhiloxKeys{};
  const R *const offset = static_cast<const R *>(layer.offset), *const slope = static_cast<const R *>(layer.slope);

  int64_t map_tile, column_tile;
  const int64_t group = divide<PLAIN>(
      grid.by_columns, divide<PLAIN>(grid.by_maps, grid.first_tile + blockIdx.x, &map_tile), &column_tile);
  [[maybe_unused]] const int64_t map_first = group * layer.group_maps; /* not of plain layers */
  int64_t k_begin, k_end;
  if (masks) {
    k_begin = map_tile * S::rows;
    k_end = k_begin + S::rows;
  } else {
    k_begin = map_tile * grid.channels * layer.masks;
    k_end = k_begin + grid.channels * layer.masks;
  }
  if (k_end > layer.group_maps) k_end = layer.group_maps;
  const int64_t k_aligned = k_begin & -static_cast<int64_t>(RUN);
  using Step = std::conditional_t<PLAIN, int, int64_t>;
  const Step steps = static_cast<Step>((layer.group_outputs + DEPTH - 1) / DEPTH);
  if (masks)
    for (int i = thread; i < S::rows * H::pitch; i += S::threads) mask_sums[i] = 0;

  const int64_t images = masks ? layer.batch : 1;
#pragma unroll 1
  for (int64_t image = 0; image < images; image++) {
    const int64_t p0 = column_tile * S::columns, q0 = masks ? image * layer.pixels + p0 : p0;
    const int64_t left = masks ? layer.pixels - p0 : layer.columns - q0;
    const int columns = left < S::columns ? static_cast<int>(left) : S::columns;
    __syncthreads();
    if (thread < columns) {
      const Place p = place_make<PLAIN>(layer, q0 + thread);
      table[thread] = {place_in(layer.input, p), place_in(layer.grad_output, p), place_in(layer.grad_input, p),
                       pixel_make(layer, p)};
    }
    R carry = 0; /* of a channel in pieces: this thread's pixel */
#pragma unroll 1
    for (int64_t k0 = k_aligned; k0 < k_end; k0 += S::rows) {
      __syncthreads();
      Tile<D, S::rows, S::columns, S::threads, ROWS_FASTEST, G, false> tile;
      tile.start([](int) { return R(0); });
      Ring<STAGES> ring(H::stage_bytes);
      WeightTiles<D, DEPTH, S::rows, S::threads, PLAIN> weight(layer, group, 0, k0, pitch_of<D>(ROWS_FASTEST, S::rows));
      const std::conditional_t<PLAIN, PlainGradient<D, S, G>, AnyGradient<D, S, G>> gradient(layer, table, columns,
                                                                                             group);
      if constexpr (PLAIN)
        prefetch_input<D, S, WAY>(layer, table, columns, group, static_cast<uint32_t>(k0),
                                  static_cast<uint32_t>(k_end < k0 + S::rows ? k_end : k0 + S::rows));
      const auto load = [&](Step step) {
        if (step < steps) {
          char *const to = pipeline + ring.of(STAGES - 1);
          weight.stage(layer, to, pitch_of<D>(ROWS_FASTEST, S::rows));
          weight.next_rows(layer);
          gradient.load(step, to + H::weight_bytes);
        }
        copy_commit();
      };
      Step step = 1 - STAGES;
#pragma unroll 1
      do {
        if (step >= 0) {
          copy_wait<STAGES - 2>();
          __syncthreads();
        }
        load(step + STAGES - 1);
        const char *const from = pipeline + ring.of(0);
        if (step >= 0) tile.add_product(from, from + H::weight_bytes);
        ring.next();
      } while (++step < steps);
      copy_wait<0>();
      __syncthreads();
      tile.each([&](int row, int column, R value) {
        sums[WAY == PLAIN_CHANNELS ? column * H::pitch_maps + row : row * H::pitch + column] = value;
      });
      __syncthreads();

      /* From da to d, eight maps of a pixel at a time; a thread keeps its pixel and goes through its share of the maps.
       */
      constexpr int SHARE = S::rows / (S::threads / S::columns);
      const int j = thread % S::columns, first_run = thread / S::columns * SHARE;
      if constexpr (PLAIN) {
        if (j < columns && k0 + first_run < k_end)
          plain_gradient<D, WAY, SHARE, H::pitch>(
              layer, keys, group, static_cast<uint32_t>(k0 + first_run), static_cast<int>(k_end - k0 - first_run),
              table[j], sums + (WAY == PLAIN_CHANNELS ? j * H::pitch_maps + first_run : first_run * H::pitch + j));
      } else {
        Map map = map_make(layer, map_first + k0 + first_run);
        Generated last = nothing_generated();
#pragma unroll 1
        for (int run = first_run; run < first_run + SHARE && j < columns; run += RUN, map_advance(layer, &map, RUN)) {
          const int64_t k = k0 + run, left_maps = k_end - k;
          const int count = left_maps < RUN ? static_cast<int>(left_maps) : RUN;
          if (count <= 0) break;
          R u[RUN], d[RUN];
          const Column &column = table[j];
          const Source<int64_t> x = source_in<D>(layer, column.input, map.c);
          perturbed<D>(layer, seed, x, map_first + k, map, count, column.pixel, &last, u);
#pragma unroll
          for (int e = 0; e < RUN; e++) {
            d[e] = sums[(run + e) * H::pitch + j];
            note_load(&sums[(run + e) * H::pitch + j], sizeof(R));
          }
          if (slope) {
            R c[RUN];
#pragma unroll
            for (int e = 0; e < RUN; e++) c[e] = u[e];
            respond(layer, map_first + k, count, c);
            if constexpr (sizeof(D) == 2) {
#pragma unroll
              for (int e = 0; e < RUN; e++) c[e] = widen(round_to(D{}, c[e]));
            }
#pragma unroll
            for (int e = 0; e < RUN; e++)
              if (e < count) d[e] = fma_(slope[map_first + k + e], c[e], d[e] + offset[map_first + k + e]);
          }
          activate_gradient_run(layer.activation, u, d);
          if (masks) {
#pragma unroll
            for (int e = 0; e < RUN; e++)
              if (e < count) mask_sums[(run + e) * H::pitch + j] += d[e];
          } else {
#pragma unroll
            for (int e = 0; e < RUN; e++) sums[(run + e) * H::pitch + j] = d[e];
          }
        }
      }
      if (masks) continue;
      __syncthreads();

      /* The sum over each channel's maps. */
      const int self = keep(thread); /* or what is made of it would wait in registers through the product */
      constexpr int V = Depth<D>::vector;
      const auto channels_here = [&] {
        const int64_t left = layer.group_channels - map_tile * grid.channels;
        return static_cast<int>(left < grid.channels ? left : grid.channels);
      };
      if constexpr (WAY == PLAIN_CHANNELS) {
        /* They are there already. Neighbours in lanes write neighbouring 16 bytes, as many as meet all banks once. */
        constexpr int LANES = 32 / V, STEP = S::threads / LANES;
        const int here = channels_here();
        const int shift = layer.masks_shift, share = SHARE >> shift; /* the channels of a thread above */
        D *const to =
            reinterpret_cast<D *>(layer.grad_input.data) + group * layer.group_channels + map_tile * grid.channels;
        for (int column = self / LANES; column < columns; column += STEP)
#pragma unroll 1
          for (int c = self % LANES * V; c < here; c += LANES * V) {
            R sum[V];
#pragma unroll
            for (int i = 0; i < V; i += 4) {
              const int at = ((c + i) & -share) << shift | ((c + i) & (share - 1));
              const words4 four = load_shared(reinterpret_cast<const words4 *>(sums + column * H::pitch_maps + at));
#pragma unroll
              for (int e = 0; e < 4; e++) sum[i + e] = float_of(four.w[e]);
            }
            store_global(reinterpret_cast<words4 *>(to + table[column].grad_input + c), vector_made<D>(sum));
          }
        continue;
      }
      if (grid.channel_vectors) {
        /* 16 bytes of channels at a time; two lanes write the 32 of a sector. */
        static_assert(S::threads == 2 * S::columns, "a thread keeps its pixel");
        const int column = self / 2, first = static_cast<int>(k_begin - k0);
        const int here = column < columns ? channels_here() : 0;
        const int masks_of = static_cast<int>(layer.masks); /* a tile's at most */
        D *const to = reinterpret_cast<D *>(layer.grad_input.data) + table[column].grad_input +
                      group * layer.group_channels + map_tile * grid.channels;
#pragma unroll 1
        for (int c = self % 2 * V; c < here; c += 2 * V) {
          const R *from = sums + (first + c * masks_of) * H::pitch + column;
          R sum[V];
#pragma unroll
          for (int e = 0; e < V; e++) sum[e] = from[e * masks_of * H::pitch];
#pragma unroll 1
          for (int m = 1; m < masks_of; m++) {
            from += H::pitch;
#pragma unroll
            for (int e = 0; e < V; e++) sum[e] += from[e * masks_of * H::pitch];
          }
          store_global(reinterpret_cast<words4 *>(to + c), vector_made<D>(sum));
        }
        continue;
      }
      const bool in_pieces = k_aligned + S::rows < k_end;
      const int channels = static_cast<int>(in_pieces ? 1 : grid.channels);
      if (layer.grad_input_staging == STAGE_PIXELS && !in_pieces && !layer.input_float) {
        /* 16 bytes of pixels at a time; the first of a channel's maps takes the sum. */
        constexpr int CHUNKS = S::columns / V, STEP = S::threads / CHUNKS;
        const int pixel = self % CHUNKS * V, first = static_cast<int>(k_begin - k0);
        const int here = pixel < columns ? channels_here() : 0;
        const int masks_of = static_cast<int>(layer.masks); /* a tile's at most */
        const int64_t channel = layer.grad_input.channel;
        D *to = reinterpret_cast<D *>(layer.grad_input.data) + table[pixel].grad_input +
                (group * layer.group_channels + map_tile * grid.channels + self / CHUNKS) * channel;
        for (int c = self / CHUNKS; c < here; c += STEP, to += STEP * channel) {
          R *const sum = sums + (first + c * masks_of) * H::pitch + pixel;
          if (masks_of > 1) {
            R total[V];
#pragma unroll
            for (int e = 0; e < V; e++) total[e] = sum[e];
#pragma unroll 1
            for (int m = 1; m < masks_of; m++)
#pragma unroll
              for (int e = 0; e < V; e++) total[e] += sum[m * H::pitch + e];
#pragma unroll
            for (int e = 0; e < V; e++) sum[e] = total[e];
          }
          store_vector(to, sum);
        }
        continue;
      }
      /* One by one; what is contiguous goes first, without a division in the loop. */
      const int inner = layer.input_channels_fastest ? channels : S::columns;
      const int fast_step = S::threads % inner, slow_step = S::threads / inner;
      int fast = self % inner, slow = self / inner;
#pragma unroll 1
      for (int i = self; i < channels * S::columns; i += S::threads) {
        const int c = layer.input_channels_fastest ? fast : slow;
        const int column = layer.input_channels_fastest ? slow : fast;
        fast += fast_step, slow += slow_step;
        if (fast >= inner) fast -= inner, slow++;
        const int64_t channel = map_tile * grid.channels + c;
        if (column >= columns || channel >= layer.group_channels) continue;
        const int64_t first = channel * layer.masks, from = first > k0 ? first : k0;
        const int64_t last = first + layer.masks < k0 + S::rows ? first + layer.masks : k0 + S::rows;
        R sum = first < k0 ? carry : sums[(from - k0) * H::pitch + column];
#pragma unroll 1
        for (int64_t k = first < k0 ? from : from + 1; k < last; k++) sum += sums[(k - k0) * H::pitch + column];
        carry = sum;
        if (last != first + layer.masks) continue;
        const int64_t at =
            table[column].grad_input + (group * layer.group_channels + channel) * layer.grad_input.channel;
        if constexpr (sizeof(D) == 2) {
          if (layer.input_float) {
            reinterpret_cast<float *>(layer.grad_input.data)[at] = sum;
            continue;
          }
        }
        reinterpret_cast<D *>(layer.grad_input.data)[at] = round_to(D{}, sum);
      }
    }
  }
  if (!masks) return;
  __syncthreads();
  for (int i = thread; i < S::rows * S::columns; i += S::threads) {
    const int row = i / S::columns, j = i % S::columns;
    const int64_t k = k_begin + row, p = column_tile * S::columns + j;
    if (k >= k_end || p >= layer.pixels) continue;
    const R sum = mask_sums[row * H::pitch + j];
    if (layer.shared) { /* the channels' sums are added up in a kernel of their own */
      static_cast<R *>(layer.mask_parts)[(map_first + k) * layer.pixels + p] = sum;
      continue;
    }
    int64_t m;
    const int64_t c = divide(layer.by_masks, map_first + k, &m);
    const Place place = place_make(layer, p);
    const int64_t at = place.i * layer.grad_mask.row + place.j * layer.grad_mask.column + c * layer.grad_mask.channel +
                       m * layer.grad_mask.batch;
    const R value = static_cast<R>(layer.level) * sum;
    if (layer.grad_mask.dtype == PNN_FLOAT32) {
      reinterpret_cast<float *>(layer.grad_mask.data)[at] = static_cast<float>(value);
    } else if constexpr (sizeof(R) == 8) {
      reinterpret_cast<double *>(layer.grad_mask.data)[at] = value;
    } else if (layer.grad_mask.dtype == PNN_BFLOAT16) {
      reinterpret_cast<bfloat16 *>(layer.grad_mask.data)[at] = round_to(bfloat16{}, value);
    } else {
      reinterpret_cast<float16 *>(layer.grad_mask.data)[at] = round_to(float16{}, value);
    }
  }
}

template <class D, class S, Fastest G, Way WAY>
Status launch(const Layer &layer, bool masks, Stream stream) {
  Grid grid;
  /* Whole channels, with room for a tile that begins up to seven maps early. */
  int64_t channels = S::rows / layer.masks;
  if (channels * layer.masks % RUN != 0) channels = (S::rows - RUN + 1) / layer.masks;
  /* Whole runs of 16 bytes, unless that leaves out more than a quarter. */
  const bool vectors = layer.grad_input_staging == STAGE_CHANNELS && layer.group_channels % Depth<D>::vector == 0 &&
                       !layer.input_float && !masks;
  const int64_t whole = channels - channels % Depth<D>::vector;
  if (vectors && whole >= channels - channels / 4) channels = whole;
  grid.channels = masks ? 0 : channels < 1 ? 1 : channels;
  grid.channel_vectors = vectors && channels > 0 && channels == whole;
  grid.column_tiles = 0;
  const int64_t map_tiles = masks ? ceil_div(layer.group_maps, S::rows) : ceil_div(layer.group_channels, grid.channels);
  const int64_t column_tiles = ceil_div(masks ? layer.pixels : layer.columns, S::columns);
  grid.by_maps = divider_make(map_tiles);
  grid.by_columns = divider_make(column_tiles);
  const int64_t tiles = map_tiles * column_tiles * layer.groups;
  const size_t shared = static_cast<size_t>(masks ? Shape<D, S, G>::mask_bytes : Shape<D, S, G>::bytes);
  Status status = STATUS_OK;
  for (grid.first_tile = 0; grid.first_tile < tiles && status == STATUS_OK; grid.first_tile += GRID_MOST) {
    const int64_t blocks = tiles - grid.first_tile < GRID_MOST ? tiles - grid.first_tile : GRID_MOST;
    const auto kernel = input_gradient_kernel<D, S, G, WAY>;
    PNN_LAUNCH(status, kernel, blocks, S::threads, shared, stream, layer, grid);
  }
  return status;
}

template <class D, class S, Fastest G>
Status choose_way(const Layer &layer, bool masks, Stream stream) {
  if constexpr (sizeof(D) < 8) {
    /* g's copies must be whole runs of 16 bytes. */
    const bool whole =
        G == ROWS_FASTEST ? layer.grad_output_staging == STAGE_PIXELS : layer.group_outputs % Depth<D>::vector == 0;
    if (is_plain<D>(layer) && whole && !masks) {
      if (way_of<D>(layer) == PLAIN_CHANNELS && layer.grad_input_staging == STAGE_CHANNELS && layer.masks <= 8)
        return launch<D, S, G, PLAIN_CHANNELS>(layer, masks, stream);
      return launch<D, S, G, PLAIN_PIXELS>(layer, masks, stream);
    }
  }
  return launch<D, S, G, ANY_WAY>(layer, masks, stream);
}

template <class D, class S>
Status choose_order(const Layer &layer, bool masks, Stream stream) {
  if (layer.grad_output_staging == STAGE_CHANNELS) return choose_way<D, S, DEPTH_FASTEST>(layer, masks, stream);
  return choose_way<D, S, ROWS_FASTEST>(layer, masks, stream);
}

template <class D>
Status choose(const Layer &layer, bool masks, Stream stream) {
  if (!masks && layer.group_maps > Small::rows && enough_blocks(layer, layer.group_maps))
    return choose_order<D, Large>(layer, masks, stream);
  return choose_order<D, Small>(layer, masks, stream);
}

template <class D, class S>
void list(Visit visit, const std::string &name) {
  for (const char *way : {"", " pixels", " channels"}) {
    if (sizeof(D) == 8 && *way) break;
    visit((name + " depth" + way).c_str(), S::threads, Shape<D, S, DEPTH_FASTEST>::bytes);
    visit((name + " rows" + way).c_str(), S::threads, Shape<D, S, ROWS_FASTEST>::bytes);
  }
}

}  // namespace

void list_input_gradient(Visit visit) {
  list<float, Large>(visit, "input_gradient float Large");
  list<float, Small>(visit, "input_gradient float Small");
  list<double, Small>(visit, "input_gradient double Small");
  list<tf32, Large>(visit, "input_gradient tf32 Large");
  list<tf32, Small>(visit, "input_gradient tf32 Small");
  list<bfloat16, Large>(visit, "input_gradient bfloat16 Large");
  list<bfloat16, Small>(visit, "input_gradient bfloat16 Small");
  list<float16, Large>(visit, "input_gradient float16 Large");
  list<float16, Small>(visit, "input_gradient float16 Small");
}

Status run_input_gradient(const Layer &layer, int product, bool masks, Stream stream) {
  switch (product) {
    case PRODUCT_TF32: return choose<tf32>(layer, masks, stream);
    case PNN_FLOAT32: return choose<float>(layer, masks, stream);
    case PNN_FLOAT64: return choose_order<double, Small>(layer, masks, stream);
    case PNN_BFLOAT16: return choose<bfloat16>(layer, masks, stream);
    default: return choose<float16>(layer, masks, stream);
  }
}

}  // namespace pnn_cuda
