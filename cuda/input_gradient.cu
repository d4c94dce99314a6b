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
 * be added up over m.
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
};

template <class D, class S, Fastest G>
struct Shape {
  using R = typename RealOf<D>::type;
  static constexpr int DEPTH = Depth<D>::value;
  static constexpr int weight_bytes = bytes_of<D>(ROWS_FASTEST, S::rows);
  static constexpr int gradient_bytes = bytes_of<D>(G, S::columns);
  static constexpr int stage_bytes = weight_bytes + gradient_bytes;
  static constexpr int table_bytes = S::columns * static_cast<int>(sizeof(Column));
  static constexpr int pitch = S::columns + 8;
  static constexpr int sums_bytes = S::rows * pitch * static_cast<int>(sizeof(R));
  static constexpr int work_bytes = STAGES * stage_bytes > sums_bytes ? STAGES *stage_bytes : sums_bytes;
  static constexpr int bytes = table_bytes + work_bytes;
  static constexpr int mask_bytes = bytes + sums_bytes;
};

/* From da to d in plain layers (response.h), for SHARE maps of a pixel from k on, `count` of which are there. */
template <class D, int SHARE, int PITCH>
PNN_DEVICE void plain_gradient(const Layer &layer, const PhiloxKeys &keys, int64_t group, uint32_t k, int count,
                               const Column &column, float *d) {
  const int64_t size = static_cast<int64_t>(sizeof(D)), step = layer.input.channel * size;
  const char *const x = layer.input.data + column.input * size + group * layer.group_channels * step;
  const uint32_t row = column.pixel.row, across = column.pixel.column;
  const uint32_t block = static_cast<uint32_t>(group * layer.group_maps / 16) + k / 16;
#pragma unroll 1
  for (int run = 0; run < SHARE && run < count; run += SIXTEEN) {
    float u[SIXTEEN];
    const int64_t c = static_cast<int64_t>((k + static_cast<uint32_t>(run)) >> layer.masks_shift);
    plain_perturbed<D, false>(layer, keys, block + static_cast<uint32_t>(run / SIXTEEN), row, across, x + c * step,
                              step, u);
#pragma unroll
    for (int e = 0; e < SIXTEEN; e++) {
      float *const at = d + (run + e) * PITCH;
      note_load(at, sizeof(float));
      *at = u[e] <= 0 ? 0.0f : *at;
    }
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
    const int staging = G == DEPTH_FASTEST                          ? STAGE_CHANNELS
                        : layer.grad_output_staging == STAGE_PIXELS ? STAGE_PIXELS
                                                                    : STAGE_ELEMENTS;
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

/* PLAIN: the input's gradient of a plain layer, with g in runs of 16 bytes. */
template <class D, class S, Fastest G, bool PLAIN>
__global__ void __launch_bounds__(S::threads, (blocks_of<D, S, PLAIN>))
    input_gradient_kernel(const __grid_constant__ Layer layer, const __grid_constant__ Grid grid) {
  using H = Shape<D, S, G>;
  using R = typename H::R;
  constexpr int DEPTH = H::DEPTH;
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
  const int64_t group =
      divide<PLAIN>(grid.by_columns, divide<PLAIN>(grid.by_maps, grid.first_tile + blockIdx.x, &map_tile), &column_tile);
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
      WeightTiles<D, DEPTH, S::rows, S::threads, PLAIN> weight(layer, group, 0, k0);
      const std::conditional_t<PLAIN, PlainGradient<D, S, G>, AnyGradient<D, S, G>> gradient(layer, table, columns,
                                                                                             group);
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
      tile.each([&](int row, int column, R value) { sums[row * H::pitch + column] = value; });
      __syncthreads();

      /* From da to d, eight maps of a pixel at a time; a thread keeps its pixel and goes through its share of the maps.
       */
      constexpr int SHARE = S::rows / (S::threads / S::columns);
      const int j = thread % S::columns, first_run = thread / S::columns * SHARE;
      if constexpr (PLAIN) {
        if (j < columns && k0 + first_run < k_end)
          plain_gradient<D, SHARE, H::pitch>(layer, keys, group, static_cast<uint32_t>(k0 + first_run),
                                             static_cast<int>(k_end - k0 - first_run), table[j],
                                             sums + first_run * H::pitch + j);
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
      const bool in_pieces = k_aligned + S::rows < k_end;
      const int channels = static_cast<int>(in_pieces ? 1 : grid.channels);
      if (layer.grad_input_staging == STAGE_PIXELS && !in_pieces && !layer.input_float) {
        /* 16 bytes of pixels at a time; the first of a channel's maps takes the sum. */
        constexpr int V = Depth<D>::vector, CHUNKS = S::columns / V, STEP = S::threads / CHUNKS;
        const int pixel = thread % CHUNKS * V, first = static_cast<int>(k_begin - k0);
        const int64_t left = layer.group_channels - map_tile * grid.channels;
        const int here = pixel >= columns ? 0 : left < channels ? static_cast<int>(left) : channels;
        const int masks_of = static_cast<int>(layer.masks); /* a tile's at most */
        const int64_t channel = layer.grad_input.channel;
        D *to = reinterpret_cast<D *>(layer.grad_input.data) + table[pixel].grad_input +
                (group * layer.group_channels + map_tile * grid.channels + thread / CHUNKS) * channel;
        for (int c = thread / CHUNKS; c < here; c += STEP, to += STEP * channel) {
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
#pragma unroll 1
      for (int i = thread; i < channels * S::columns; i += S::threads) {
        const int c = layer.input_channels_fastest ? i % channels : i / S::columns;
        const int column = layer.input_channels_fastest ? i / channels : i % S::columns;
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

template <class D, class S, Fastest G, bool PLAIN>
Status launch(const Layer &layer, bool masks, Stream stream) {
  Grid grid;
  /* Whole channels, with room for a tile that begins up to seven maps early. */
  int64_t channels = S::rows / layer.masks;
  if (channels * layer.masks % RUN != 0) channels = (S::rows - RUN + 1) / layer.masks;
  grid.channels = masks ? 0 : channels < 1 ? 1 : channels;
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
    const auto kernel = input_gradient_kernel<D, S, G, PLAIN>;
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
    if (is_plain<D>(layer) && whole && !masks) return launch<D, S, G, true>(layer, masks, stream);
  }
  return launch<D, S, G, false>(layer, masks, stream);
}

template <class D, class S>
Status choose_order(const Layer &layer, bool masks, Stream stream) {
  if (layer.grad_output_staging == STAGE_CHANNELS) return choose_way<D, S, DEPTH_FASTEST>(layer, masks, stream);
  return choose_way<D, S, ROWS_FASTEST>(layer, masks, stream);
}

template <class D>
Status choose(const Layer &layer, bool masks, Stream stream) {
  if (!masks && layer.group_maps > Small::rows && enough_blocks<Large>(layer, layer.group_maps))
    return choose_order<D, Large>(layer, masks, stream);
  return choose_order<D, Small>(layer, masks, stream);
}

template <class D, class S>
void list(Visit visit, const std::string &name) {
  for (const char *way : {"", " plain"}) {
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
