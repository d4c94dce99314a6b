/*
 * weight_gradient.cu - G[t,k] = sum over q of g[t,q] * operand[k,q], and h[t] = sum over q of g[t,q].
 *
 * The sum over pixels is cut into `splits` pieces, whose number depends on the sizes alone; each block leaves its piece
 * of the sum, and finish.cu adds the pieces in order: no atomics, the same bits in every run and on every GPU of a
 * kind.
 *
 * Per step of depth (64 bytes of pixels) g travels as it is stored, x too; the operand is made as in the forward pass,
 * as [pixel][map], and read transposed. The blocks of the first maps also add up h from the g that is in shared memory.
 */
#include <string>

#include "kernels.h"
#include "response.h"
#include "tile.h"

namespace pnn_cuda {
namespace {

constexpr int STAGES = 3;

/* What a block knows of each pixel of a step. */
struct Column {
  int64_t input, grad_output;
  Pixel pixel;
};

struct Grid {
  int64_t first_tile;
  Divider by_outputs, by_maps, by_groups;
};

/* Rows of C are outputs, its columns maps, depth pixels. */
template <class D, class S, Fastest G>
struct Shape {
  using R = typename RealOf<D>::type;
  static constexpr int DEPTH = Depth<D>::value;
  static constexpr int gradient_bytes = bytes_of<D>(G, S::rows);
  static constexpr int operand_bytes = bytes_of<D>(ROWS_FASTEST, S::columns);
  static PNN_HOST_DEVICE int input_bytes(int size) {
    const int pixels = S::columns * (DEPTH * size + 16), channels = DEPTH * (S::columns * size + 16);
    return pixels > channels ? pixels : channels;
  }
  static constexpr int table_bytes = DEPTH * static_cast<int>(sizeof(Column));
  static int bytes(int input_size) {
    return STAGES * (table_bytes + gradient_bytes + input_bytes(input_size)) + 2 * operand_bytes;
  }
};

/* The maps that a block takes, and the pixels of its piece of the sum. */
struct Part {
  int64_t k0, maps; /* of the group; as many as there are, a tile's at most */
  int64_t q_begin, q_end;
  int64_t channel_first, map_first; /* the group's */
};

/* How a thread makes its part of the operand, runs of eight maps of one pixel, the same maps in every step: x of a
 * step's pixels comes to shared memory by load(table, pixels, tile) and becomes the operand by make(step, table,
 * pixels, tile, operand). Of layers of any kind: */
template <class D, class S>
struct AnyOperand {
  using R = typename RealOf<D>::type;
  static constexpr int DEPTH = Depth<D>::value, RUNS = DEPTH * (S::columns / RUN) > S::threads ? 2 : 1;
  static_assert(DEPTH * (S::columns / RUN / RUNS) <= S::threads, "one item for a thread");
  const Layer &layer;
  const Part &part;
  int staging, input_size, pitch, channels = 0, j, first_run;
  int64_t c0;
  Map map_of_thread;
  uint64_t seed;

  PNN_DEVICE AnyOperand(const Layer &layer_, const Part &part_)
      : layer(layer_), part(part_), staging(layer_.input_staging) {
    input_size = layer.input_float ? 4 : static_cast<int>(sizeof(D));
    pitch = (along_pixels(staging) ? DEPTH : static_cast<int>(S::columns)) * input_size + 16;
    c0 = map_make(layer, part.k0).c;
    if (part.maps > 0) channels = static_cast<int>(map_make(layer, part.k0 + part.maps - 1).c + 1 - c0);
    if (staging == STAGE_CHANNELS) {
      const int V = 16 / input_size;
      channels += static_cast<int>(c0 & (V - 1));
      channels = (channels + V - 1) & -V;
      c0 &= -static_cast<int64_t>(V);
    }
    j = thread_index() % DEPTH;
    first_run = thread_index() / DEPTH * (RUN * RUNS);
    map_of_thread = map_make(layer, part.k0 + first_run);
    seed = seed_read(layer);
  }
  PNN_DEVICE void load(const Column *table, int pixels, char *tile) const {
    if (staging == STAGE_ELEMENTS) return;
    const auto place = [&](int pixel, int64_t *at) {
      *at = pixel < pixels ? table[pixel].input : 0;
      return pixel < pixels;
    };
    if (input_size == static_cast<int>(sizeof(D)))
      stage_view<sizeof(D), S::columns, DEPTH, S::threads>(layer.input, staging, c0, channels, layer.group_channels,
                                                           part.channel_first, tile, pitch, place);
    else
      stage_view<4, S::columns, DEPTH, S::threads>(layer.input, staging, c0, channels, layer.group_channels,
                                                   part.channel_first, tile, pitch, place);
  }
  PNN_DEVICE void make(int64_t, const Column *table, int pixels, const char *tile, char *operand) const {
    if (first_run >= S::columns) return;
    D *const to = reinterpret_cast<D *>(operand + j * pitch_of<D>(ROWS_FASTEST, S::columns));
    const Column &column = table[j];
    Map map = map_of_thread;
    Generated last = nothing_generated();
#pragma unroll 1
    for (int run = first_run; run < first_run + RUN * RUNS; run += RUN) {
      const int64_t left = part.maps - run;
      const int count = j >= pixels || left <= 0 ? 0 : left < RUN ? static_cast<int>(left) : RUN;
      R u[RUN];
      if (count > 0) {
        const int64_t k = part.map_first + part.k0 + run;
        const Map in_layer = {part.channel_first + map.c, map.m};
        if (staging == STAGE_ELEMENTS) {
          const Source<int64_t> x = source_in<D>(layer, column.input, in_layer.c);
          perturbed<D>(layer, seed, x, k, in_layer, count, column.pixel, &last, u);
        } else {
          const int step_bytes = along_pixels(staging) ? pitch : input_size;
          const int first =
              static_cast<int>(map.c - c0) * step_bytes + j * (along_pixels(staging) ? input_size : pitch);
          const Source<int> x = {tile + first, step_bytes};
          perturbed<D>(layer, seed, x, k, in_layer, count, column.pixel, &last, u);
        }
        respond(layer, k, count, u);
      } else {
#pragma unroll
        for (int e = 0; e < RUN; e++) u[e] = 0;
      }
      store_run(to + run, u);
      map_advance(layer, &map, RUN);
    }
  }
};

/* ROWS channels (or outputs) of a step's pixels to shared memory, asynchronously, zeros beyond them: [row][pixel] with
 * PIXELS, else [pixel][row]. A thread keeps its rows, or its place among the pixels, and where they lie. */
template <class D, int ROWS, int THREADS, bool PIXELS>
struct PlainTiles {
  static constexpr int SIZE = static_cast<int>(sizeof(D)), V = 16 / SIZE, DEPTH = Depth<D>::value;
  static constexpr int LINES = PIXELS ? ROWS : DEPTH, LINE = PIXELS ? DEPTH : ROWS;
  static constexpr int CHUNKS = LINE / V, STEP = THREADS / CHUNKS, COUNT = LINES / STEP;
  static_assert(THREADS % CHUNKS == 0 && LINES % STEP == 0, "whole lines");
  const char *from;
  int64_t step; /* bytes from channel to channel */
  int rows, pixel, to, pitch;

  /* The rows start at channel `first` of the view; `count` of them are there. */
  PNN_DEVICE PlainTiles(const View &view, int64_t first, int count, int pitch_) : pitch(pitch_) {
    const int line = thread_index() / CHUNKS, place = thread_index() % CHUNKS * V;
    step = (PIXELS ? view.channel : 1) * SIZE;
    from = keep(view.data + (first + (PIXELS ? line : place)) * step);
    rows = keep(count - (PIXELS ? line : place));
    pixel = PIXELS ? place : line;
    to = keep(line * pitch + place * SIZE);
  }
  /* at(pixel): where a pixel of the step, one of `pixels`, stands in the view. */
  template <class At>
  PNN_DEVICE void load(At at, int pixels, char *tile) const {
    const char *here = from + at(pixel) * SIZE;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (!PIXELS && i > 0) here = from + at(pixel + i * STEP) * SIZE;
      copy_async16_or_zero(tile + to + i * STEP * pitch, here,
                           PIXELS ? pixel < pixels && i * STEP < rows : pixel + i * STEP < pixels && 0 < rows);
      if (PIXELS) here += STEP * step;
    }
  }
};

/* Of plain layers (response.h): sixteen maps of a pixel, in every step or, where a step has fewer items than there are
 * threads, in turns. */
template <class D, class S, bool PIXELS>
struct PlainOperand {
  static constexpr int SIZE = static_cast<int>(sizeof(D)), V = 16 / SIZE, DEPTH = Depth<D>::value;
  static constexpr int PITCH = (PIXELS ? DEPTH : S::columns) * SIZE + 16; /* of x's tile */
  static constexpr int SIXTEENS = S::columns / SIXTEEN, TURNS = S::threads / (DEPTH * SIXTEENS);
  static_assert(DEPTH * SIXTEENS * TURNS == S::threads, "every thread has its turn");
  const Layer &layer;
  PlainTiles<D, S::columns, S::threads, PIXELS> tiles;
  int maps, j, first_map, turn, offset;
  uint32_t block;
  PhiloxKeys keys;

  /* The first channel that is staged, of the group, and how many. */
  static PNN_DEVICE int first_channel(const Layer &layer, const Part &part) {
    const int c = static_cast<int>(part.k0) >> layer.masks_shift;
    return PIXELS ? c : c & -V;
  }
  static PNN_DEVICE int channels(const Layer &layer, const Part &part) {
    const int last = static_cast<int>(part.k0 + part.maps - 1) >> layer.masks_shift;
    return part.maps > 0 ? last + 1 - first_channel(layer, part) : 0;
  }
  PNN_DEVICE PlainOperand(const Layer &layer_, const Part &part)
      : layer(layer_),
        tiles(layer_.input, part.channel_first + first_channel(layer_, part), channels(layer_, part), PITCH) {
    maps = static_cast<int>(part.maps);
    j = thread_index() % DEPTH;
    first_map = thread_index() / DEPTH % SIXTEENS * SIXTEEN;
    turn = thread_index() / (DEPTH * SIXTEENS);
    const int k = static_cast<int>(part.k0) + first_map, c = (k >> layer.masks_shift) - first_channel(layer, part);
    offset = keep(PIXELS ? c * PITCH + j * SIZE : j * PITCH + c * SIZE);
    block = static_cast<uint32_t>((part.map_first + k) / 16);
    keys = philox_keys(seed_read(layer));
  }
  PNN_DEVICE void load(const Column *table, int pixels, char *tile) const {
    tiles.load([&](int pixel) { return table[pixel].input; }, pixels, tile);
  }
  PNN_DEVICE void make(int step, const Column *table, int pixels, const char *tile, char *operand) const {
    if (step % TURNS != turn) return;
    D *const to = reinterpret_cast<D *>(operand + j * pitch_of<D>(ROWS_FASTEST, S::columns)) + first_map;
    if (j >= pixels || first_map >= maps) {
      store_zeros(to);
      return;
    }
    plain_response<D, PIXELS ? PITCH : SIZE>(layer, keys, block, table[j].pixel.row, table[j].pixel.column,
                                             tile + offset, to);
  }
};

/* g of a step's pixels, in layers of any kind and in plain ones. */
template <class D, class S, Fastest G>
struct AnyGradient {
  const Layer &layer;
  int64_t t0, output_first;
  PNN_DEVICE AnyGradient(const Layer &layer_, int64_t group, int64_t t0_)
      : layer(layer_), t0(t0_), output_first(group * layer_.group_outputs) {}
  PNN_DEVICE void load(const Column *table, int pixels, char *tile) const {
    const int own = layer.grad_output_staging;
    const int order = G == ROWS_FASTEST ? STAGE_CHANNELS : along_pixels(own) ? own : STAGE_ELEMENTS;
    const auto place = [&](int pixel, int64_t *at) {
      *at = pixel < pixels ? table[pixel].grad_output : 0;
      return pixel < pixels;
    };
    stage_view<sizeof(D), S::rows, Depth<D>::value, S::threads>(
        layer.grad_output, order, t0, S::rows, layer.group_outputs, output_first, tile, pitch_of<D>(G, S::rows), place);
  }
};
template <class D, class S, Fastest G>
struct PlainGradient {
  PlainTiles<D, S::rows, S::threads, G == DEPTH_FASTEST> tiles;
  PNN_DEVICE PlainGradient(const Layer &layer, int64_t group, int64_t t0)
      : tiles(layer.grad_output, group * layer.group_outputs + t0,
              layer.group_outputs - t0 < S::rows ? static_cast<int>(layer.group_outputs - t0) : S::rows,
              pitch_of<D>(G, S::rows)) {}
  PNN_DEVICE void load(const Column *table, int pixels, char *tile) const {
    tiles.load([&](int pixel) { return table[pixel].grad_output; }, pixels, tile);
  }
};

template <class D, class S, Fastest G, Way WAY>
__global__ void __launch_bounds__(S::threads, (blocks_of<D, S, (WAY != ANY_WAY)>))
    weight_gradient_kernel(const __grid_constant__ Layer layer, const __grid_constant__ Grid grid) {
  using H = Shape<D, S, G>;
  using R = typename H::R;
  constexpr bool PLAIN = WAY != ANY_WAY;
  using Operand = std::conditional_t<PLAIN, PlainOperand<D, S, WAY == PLAIN_PIXELS>, AnyOperand<D, S>>;
  using Gradient = std::conditional_t<PLAIN, PlainGradient<D, S, G>, AnyGradient<D, S, G>>;
  using Step = std::conditional_t<PLAIN, int, int64_t>;
  constexpr int DEPTH = H::DEPTH;
  PNN_SHARED_MEMORY(memory);
  const int stage_bytes = H::table_bytes + H::gradient_bytes +
                          H::input_bytes(!PLAIN && layer.input_float ? 4 : static_cast<int>(sizeof(D)));
  char *const operands = memory + STAGES * stage_bytes;
  const int thread = thread_index();

  int64_t output_tile, map_tile, group;
  const int64_t outputs_done = divide<PLAIN>(grid.by_outputs, grid.first_tile + blockIdx.x, &output_tile);
  const int64_t split = divide<PLAIN>(grid.by_groups, divide<PLAIN>(grid.by_maps, outputs_done, &map_tile), &group);
  const int64_t t0 = output_tile * S::rows, k0 = map_tile * S::columns;
  const int64_t output_first = group * layer.group_outputs;
  Part part;
  part.k0 = k0;
  part.maps = layer.group_maps - k0 < S::columns ? layer.group_maps - k0 : S::columns;
  part.q_begin = split * layer.split_columns;
  part.q_end = part.q_begin + layer.split_columns < layer.columns ? part.q_begin + layer.split_columns : layer.columns;
  part.channel_first = group * layer.group_channels;
  part.map_first = group * layer.group_maps;
  const bool products = layer.products != nullptr, totals = layer.totals != nullptr && map_tile == 0;
  const Step pixels = static_cast<Step>(part.q_begin < part.q_end ? part.q_end - part.q_begin : 0);
  const Step steps = (pixels + (DEPTH - 1)) / DEPTH;
  /* A step's pixels. */
  const auto pixels_of = [&](Step step) {
    const Step left = pixels - step * DEPTH;
    return left < DEPTH ? static_cast<int>(left) : DEPTH;
  };

  Operand operand(layer, part);
  const Gradient gradient(layer, group, t0);
  /* Of each stage: where its pixels stand, g, x. */
  Ring<STAGES> ring(stage_bytes);
  const auto table_at = [&](int ahead) { return reinterpret_cast<Column *>(memory + ring.of(ahead)); };
  /* Where a step's pixels stand: made once, one step before the step is loaded. */
  const auto look_up = [&](Step step, int ahead) {
    if (step >= steps || thread >= pixels_of(step)) return;
    const Place p = place_make<PLAIN>(layer, part.q_begin + step * DEPTH + thread);
    table_at(ahead)[thread] = {place_in(layer.input, p), place_in(layer.grad_output, p), pixel_make(layer, p)};
  };
  const auto load = [&](Step step) {
    if (step < steps) {
      const Column *const table = table_at(STAGES - 1);
      char *const to = memory + ring.of(STAGES - 1) + H::table_bytes;
      gradient.load(table, pixels_of(step), to);
      if (products) operand.load(table, pixels_of(step), to + H::gradient_bytes);
    }
    copy_commit();
  };

  Tile<D, S::rows, S::columns, S::threads, G, ROWS_FASTEST> tile;
  tile.start([](int) { return R(0); });
  R total = 0;
  int now = 0; /* of the two operands the one that is multiplied */
  look_up(0, STAGES - 1);
  __syncthreads();
  Step step = 1 - STAGES;
#pragma unroll 1
  do {
    if (step >= -1) {
      copy_wait<STAGES - 3>();
      __syncthreads();
    }
    load(step + STAGES - 1);
    look_up(step + STAGES, 0);
    if (products && step >= -1 && step + 1 < steps)
      operand.make(step + 1, table_at(1), pixels_of(step + 1), memory + ring.of(1) + H::table_bytes + H::gradient_bytes,
                   operands + (H::operand_bytes - now));
    if (step >= 0) {
      const char *const g = memory + ring.of(0) + H::table_bytes;
      if (products) tile.add_product(g, operands + now);
      if (totals && thread < S::rows) {
#pragma unroll
        for (int j = 0; j < DEPTH; j++) {
          const char *at = G == DEPTH_FASTEST ? g + thread * pitch_of<D>(G, S::rows) + j * static_cast<int>(sizeof(D))
                                              : g + j * pitch_of<D>(G, S::rows) + thread * static_cast<int>(sizeof(D));
          total += widen(*reinterpret_cast<const D *>(at));
        }
      }
    }
    ring.next();
    now = H::operand_bytes - now;
  } while (++step < steps);
  copy_wait<0>();

  if (totals && thread < S::rows && t0 + thread < layer.group_outputs)
    static_cast<R *>(layer.totals)[split * layer.outputs + output_first + t0 + thread] = total;
  if (!products) return;
  R *const out = static_cast<R *>(layer.products) + (split * layer.outputs + output_first + t0) * layer.group_maps + k0;
  const int64_t rows = layer.group_outputs - t0;
  tile.each([&](int row, int column, R value) {
    if (row < rows && column < part.maps) out[row * layer.group_maps + column] = value;
  });
}

template <class D, class S, Fastest G, Way WAY>
Status launch(const Layer &layer, Stream stream) {
  Grid grid;
  const int64_t outputs = ceil_div(layer.group_outputs, S::rows);
  const int64_t maps = layer.products && layer.group_maps ? ceil_div(layer.group_maps, S::columns) : 1;
  grid.by_outputs = divider_make(outputs);
  grid.by_maps = divider_make(maps);
  grid.by_groups = divider_make(layer.groups);
  const int64_t tiles = outputs * maps * layer.groups * layer.splits;
  const size_t shared = static_cast<size_t>(Shape<D, S, G>::bytes(layer.input_float ? 4 : static_cast<int>(sizeof(D))));
  Status status = STATUS_OK;
  for (grid.first_tile = 0; grid.first_tile < tiles && status == STATUS_OK; grid.first_tile += GRID_MOST) {
    const int64_t blocks = tiles - grid.first_tile < GRID_MOST ? tiles - grid.first_tile : GRID_MOST;
    const auto kernel = weight_gradient_kernel<D, S, G, WAY>;
    PNN_LAUNCH(status, kernel, blocks, S::threads, shared, stream, layer, grid);
  }
  return status;
}

template <class D, class S, Fastest G>
Status choose_way(const Layer &layer, Stream stream) {
  /* g's copies must be whole runs of 16 bytes too. */
  const bool whole =
      G == DEPTH_FASTEST ? layer.grad_output_staging == STAGE_PIXELS : layer.group_outputs % Depth<D>::vector == 0;
  const Way way = whole ? way_of<D>(layer) : ANY_WAY;
  if constexpr (sizeof(D) < 8) {
    if (way == PLAIN_PIXELS) return launch<D, S, G, PLAIN_PIXELS>(layer, stream);
    if (way == PLAIN_CHANNELS) return launch<D, S, G, PLAIN_CHANNELS>(layer, stream);
  }
  return launch<D, S, G, ANY_WAY>(layer, stream);
}

template <class D, class S>
Status choose_order(const Layer &layer, Stream stream) {
  if (layer.grad_output_staging == STAGE_CHANNELS) return choose_way<D, S, ROWS_FASTEST>(layer, stream);
  return choose_way<D, S, DEPTH_FASTEST>(layer, stream);
}

template <class D>
Status choose(const Layer &layer, Stream stream) {
  if (weight_gradient_is_large(layer)) return choose_order<D, Large>(layer, stream);
  return choose_order<D, Small>(layer, stream);
}

template <class D, class S>
void list(Visit visit, const std::string &name) {
  constexpr int size = static_cast<int>(sizeof(D));
  for (const char *way : {"", " pixels", " channels"}) {
    if (size == 8 && *way) break;
    visit((name + " depth" + way).c_str(), S::threads, Shape<D, S, DEPTH_FASTEST>::bytes(size));
    visit((name + " rows" + way).c_str(), S::threads, Shape<D, S, ROWS_FASTEST>::bytes(size));
  }
}

}  // namespace

void list_weight_gradient(Visit visit) {
  list<float, Large>(visit, "weight_gradient float Large");
  list<float, Small>(visit, "weight_gradient float Small");
  list<double, Small>(visit, "weight_gradient double Small");
  list<tf32, Large>(visit, "weight_gradient tf32 Large");
  list<tf32, Small>(visit, "weight_gradient tf32 Small");
  list<bfloat16, Large>(visit, "weight_gradient bfloat16 Large");
  list<bfloat16, Small>(visit, "weight_gradient bfloat16 Small");
  list<float16, Large>(visit, "weight_gradient float16 Large");
  list<float16, Small>(visit, "weight_gradient float16 Small");
}

Status run_weight_gradient(const Layer &layer, int product, Stream stream) {
  switch (product) {
    case PRODUCT_TF32: return choose<tf32>(layer, stream);
    case PNN_FLOAT32: return choose<float>(layer, stream);
    case PNN_FLOAT64: return choose_order<double, Small>(layer, stream);
    case PNN_BFLOAT16: return choose<bfloat16>(layer, stream);
    default: return choose<float16>(layer, stream);
  }
}

}  // namespace pnn_cuda
