/*
 * forward.cu - y = start + V * response(x): a matrix product whose right operand is made on the way.
 *
 * A block computes ROWS outputs of COLUMNS pixels. Per step of depth (64 bytes of maps):
 *
 *     global --cp.async--> x, as it is stored ----registers----> operand [pixel][map] --ldmatrix--> tensor cores
 *     global --cp.async--> V [output][map] ------------------------------------------^
 *
 * The middle arrow is where masks are added (generated in registers, or read), the activation applied, the mean
 * subtracted and the operand rounded. x and V travel STAGES - 1 steps ahead; the operand of the next step is made
 * between the same two barriers in which this step's is multiplied, so that the arithmetic of one hides behind the
 * other. Tensors whose pixels do not lie in aligned runs of 4 bytes or more, nor channels in runs of 16, skip the first
 * arrow.
 */
#include <string>

#include "kernels.h"
#include "response.h"
#include "tile.h"

namespace pnn_cuda {
namespace {

/* What a block knows of each of its columns. */
struct Column {
  int64_t input, output;
  Pixel pixel;
};

template <class D, class S>
struct Shape {
  using R = typename RealOf<D>::type;
  static constexpr int DEPTH = Depth<D>::value;
  static constexpr int STAGES = S::rows == 64 ? 4 : 3; /* four small blocks, or two large ones, fit into 227 KiB */
  static constexpr int weight_bytes = bytes_of<D>(DEPTH_FASTEST, S::rows);
  static constexpr int operand_bytes = bytes_of<D>(DEPTH_FASTEST, S::columns);
  static constexpr int table_bytes = S::columns * static_cast<int>(sizeof(Column));
  /* Sums leave through shared memory in the output's order; the padding keeps the fragments' banks apart. */
  static constexpr int pitch_pixels = S::columns + 8, pitch_outputs = S::rows + 4;
  static constexpr int sums_bytes =
      static_cast<int>(sizeof(R)) *
      (S::rows * pitch_pixels > S::columns * pitch_outputs ? S::rows * pitch_pixels : S::columns * pitch_outputs);
  static PNN_HOST_DEVICE int input_bytes(int size) {
    const int pixels = DEPTH * (S::columns * size + 16), channels = S::columns * (DEPTH * size + 16);
    return pixels > channels ? pixels : channels;
  }
  static int bytes(int input_size) {
    const int pipeline = STAGES * (weight_bytes + input_bytes(input_size)) + 2 * operand_bytes;
    return table_bytes + (pipeline > sums_bytes ? pipeline : sums_bytes);
  }
};

/* How a thread makes its part of the operand, RUNS runs of eight maps of one pixel: x of a step's maps comes to shared
 * memory by load(step, tile) and becomes the operand by make(step, tile, to). Of layers of any kind: */
template <class D, class S>
struct AnyOperand {
  using R = typename RealOf<D>::type;
  static constexpr int DEPTH = Depth<D>::value, RUNS = DEPTH / RUN >= 4 ? 2 : 1;
  static_assert(S::columns * (DEPTH / RUN / RUNS) <= S::threads, "one item for a thread");
  const Layer &layer;
  const Column *table;
  int columns, staging, input_size, V, pitch, j, first_run;
  int64_t channel_first, map_first;
  uint64_t seed;
  Map loaded = {0, 0}, made = {0, 0}; /* the first map of the next step of each kind */

  PNN_DEVICE AnyOperand(const Layer &layer_, const Column *table_, int columns_, int64_t group)
      : layer(layer_), table(table_), columns(columns_), staging(layer_.input_staging) {
    input_size = layer.input_float ? 4 : static_cast<int>(sizeof(D));
    V = 16 / input_size;
    pitch = (along_pixels(staging) ? S::columns : DEPTH) * input_size + 16;
    j = thread_index() % S::columns;
    first_run = thread_index() / S::columns * (RUN * RUNS);
    channel_first = group * layer.group_channels;
    map_first = group * layer.group_maps;
    seed = seed_read(layer);
  }
  /* The first channel of a step that starts at `map`; a whole vector's where channels are contiguous. */
  PNN_DEVICE int64_t first_channel(const Map &map) const {
    return staging == STAGE_CHANNELS ? map.c & -static_cast<int64_t>(V) : map.c;
  }
  PNN_DEVICE void load(int64_t, char *tile) {
    const int64_t c0 = first_channel(loaded);
    map_advance(layer, &loaded, DEPTH);
    if (staging == STAGE_ELEMENTS) return;
    /* Up to the channel that the next step starts with, the last of the group at most. */
    const int64_t end = loaded.m ? loaded.c + 1 : loaded.c;
    const int count = staging == STAGE_CHANNELS || end - c0 > DEPTH ? DEPTH : static_cast<int>(end - c0);
    const auto offset = [&](int column, int64_t *at) {
      *at = column < columns ? table[column].input : 0;
      return column < columns;
    };
    if (input_size == static_cast<int>(sizeof(D)))
      stage_view<sizeof(D), DEPTH, S::columns, S::threads>(layer.input, staging, c0, count, layer.group_channels,
                                                           channel_first, tile, pitch, offset);
    else
      stage_view<4, DEPTH, S::columns, S::threads>(layer.input, staging, c0, count, layer.group_channels, channel_first,
                                                   tile, pitch, offset);
  }
  PNN_DEVICE void make(int64_t step, const char *tile, char *operand) {
    D *const to = reinterpret_cast<D *>(operand + j * pitch_of<D>(DEPTH_FASTEST, 0));
    const int64_t c0 = first_channel(made);
    Map map = made;
    map_advance(layer, &made, DEPTH);
    if (first_run >= DEPTH) return;
    map_advance(layer, &map, first_run);
    Generated last = nothing_generated();
#pragma unroll 1
    for (int run = first_run; run < first_run + RUN * RUNS; run += RUN) {
      const int64_t k = step * DEPTH + run, left = layer.group_maps - k;
      const int count = j >= columns || left <= 0 ? 0 : left < RUN ? static_cast<int>(left) : RUN;
      R u[RUN];
      if (count > 0) {
        const Column &column = table[j];
        if (staging == STAGE_ELEMENTS) {
          const Source<int64_t> x = source_in<D>(layer, column.input, channel_first + map.c);
          perturbed<D>(layer, seed, x, map_first + k, {channel_first + map.c, map.m}, count, column.pixel, &last, u);
        } else {
          const int step_bytes = along_pixels(staging) ? pitch : input_size;
          const int first =
              static_cast<int>(map.c - c0) * step_bytes + j * (along_pixels(staging) ? input_size : pitch);
          const Source<int> x = {tile + first, step_bytes};
          perturbed<D>(layer, seed, x, map_first + k, {channel_first + map.c, map.m}, count, column.pixel, &last, u);
        }
        respond(layer, map_first + k, count, u);
      } else {
#pragma unroll
        for (int e = 0; e < RUN; e++) u[e] = 0;
      }
      store_run(to + run, u);
      map_advance(layer, &map, RUN);
    }
  }
};

/* Of plain layers (response.h): sixteen maps of a pixel, in every step or, where a step has fewer items than there are
 * threads, in turns. */
template <class D, class S, bool PIXELS>
struct PlainOperand {
  static constexpr int SIZE = static_cast<int>(sizeof(D)), V = 16 / SIZE, DEPTH = Depth<D>::value;
  static constexpr int PITCH = (PIXELS ? S::columns : DEPTH) * SIZE + 16; /* of x's tile */
  static constexpr int SIXTEENS = DEPTH / SIXTEEN, TURNS = S::threads / (S::columns * SIXTEENS);
  static_assert(S::columns * SIXTEENS * TURNS == S::threads, "every thread has its turn");
  const Layer &layer;
  StepTiles<D, S::columns, S::threads, PIXELS> tiles;
  int j, first_map, turn;
  uint32_t row = 0, column = 0, block;
  PhiloxKeys keys;

  /* The channels that a step takes, whole vectors where they are contiguous. */
  static PNN_DEVICE int channels(const Layer &layer) {
    const int count = DEPTH >> layer.masks_shift, least = PIXELS ? 1 : V;
    return count < least ? least : count;
  }
  PNN_DEVICE PlainOperand(const Layer &layer_, const Column *table, int columns, int64_t group)
      : layer(layer_),
        tiles(layer_.input, group * layer_.group_channels, layer_.group_channels, channels(layer_), columns, PITCH,
              [&](int at) { return table[at].input; }) {
    j = thread_index() % S::columns;
    first_map = thread_index() / S::columns % SIXTEENS * SIXTEEN;
    turn = thread_index() / (S::columns * SIXTEENS);
    if (j < columns) row = table[j].pixel.row, column = table[j].pixel.column;
    block = static_cast<uint32_t>(group * layer.group_maps / 16) + static_cast<uint32_t>(first_map / 16);
    keys = philox_keys(seed_read(layer));
  }
  /* The first channel that is staged of a step. */
  PNN_DEVICE int first_channel(int step) const {
    const int c = step * DEPTH >> layer.masks_shift;
    return PIXELS ? c : c & -V;
  }
  PNN_DEVICE void load(int step, char *tile) const { tiles.load(first_channel(step), tile); }
  PNN_DEVICE void make(int step, const char *tile, char *operand) const {
    if (step % TURNS != turn) return;
    D *const to = reinterpret_cast<D *>(operand + j * pitch_of<D>(DEPTH_FASTEST, 0)) + first_map;
    const int k = step * DEPTH + first_map;
    if (k >= static_cast<int>(layer.group_maps)) {
      store_zeros(to);
      return;
    }
    const int offset = PIXELS ? (first_map >> layer.masks_shift) * PITCH + j * SIZE
                              : ((k >> layer.masks_shift) - first_channel(step)) * SIZE + j * PITCH;
    plain_response<D, PIXELS ? PITCH : SIZE>(layer, keys, block + static_cast<uint32_t>(step * DEPTH / 16), row, column,
                                             tile + offset, to);
  }
};

template <class D, class S, Way WAY>
__global__ void __launch_bounds__(S::threads, (blocks_of<D, S, (WAY != ANY_WAY)>))
    forward_kernel(const __grid_constant__ Layer layer, int64_t first_tile, const __grid_constant__ Divider by_rows,
                   const __grid_constant__ Divider by_columns) {
  using H = Shape<D, S>;
  using R = typename H::R;
  constexpr bool PLAIN = WAY != ANY_WAY;
  using Operand = std::conditional_t<PLAIN, PlainOperand<D, S, WAY == PLAIN_PIXELS>, AnyOperand<D, S>>;
  using Step = std::conditional_t<PLAIN, int, int64_t>;
  constexpr int DEPTH = H::DEPTH, STAGES = H::STAGES;
  PNN_SHARED_MEMORY(memory);
  Column *const table = reinterpret_cast<Column *>(memory);
  char *const pipeline = memory + H::table_bytes;
  const int stage_bytes =
      H::weight_bytes + H::input_bytes(!PLAIN && layer.input_float ? 4 : static_cast<int>(sizeof(D)));
  char *const operands = pipeline + STAGES * stage_bytes;
  const int thread = thread_index();

  int64_t row_tile, column_tile;
  const int64_t group =
      divide<PLAIN>(by_columns, divide<PLAIN>(by_rows, first_tile + blockIdx.x, &row_tile), &column_tile);
  const int64_t t0 = row_tile * S::rows, q0 = column_tile * S::columns;
  const int columns = layer.columns - q0 < S::columns ? static_cast<int>(layer.columns - q0) : S::columns;

  if (thread < columns) {
    const Place p = place_make<PLAIN>(layer, q0 + thread);
    table[thread] = {place_in(layer.input, p), place_in(layer.output, p), pixel_make(layer, p)};
  }
  Tile<D, S::rows, S::columns, S::threads, DEPTH_FASTEST, DEPTH_FASTEST> tile;
  const int64_t output_first = group * layer.group_outputs + t0;
  const int rows =
      layer.group_outputs - t0 < S::rows ? static_cast<int>(layer.group_outputs - t0) : static_cast<int>(S::rows);
  const R *const start = static_cast<const R *>(layer.start); /* of normalisation */
  const D *const bias = reinterpret_cast<const D *>(layer.bias) + output_first * layer.bias_step;
  if (start || layer.bias)
    tile.start([&](int row) {
      if (row >= rows) return R(0);
      return start ? start[output_first + row] : widen(bias[row * layer.bias_step]);
    });
  else
    tile.start([](int) { return R(0); });
  __syncthreads();

  const Step steps = static_cast<Step>((layer.group_maps + DEPTH - 1) / DEPTH);
  Ring<STAGES> ring(stage_bytes);
  WeightTiles<D, S::rows, DEPTH, S::threads, PLAIN> weight(layer, group, t0, 0, pitch_of<D>(DEPTH_FASTEST, 0));
  Operand operand(layer, table, columns, group);
  int now = 0;
  /* The steps before 0 only fill the pipeline; so that each part of the body stands in the code once. */
  Step step = 1 - STAGES;
#pragma unroll 1
  do {
    if (step >= -1) {
      copy_wait<STAGES - 3>(); /* the next step's x and this step's V are there */
      __syncthreads();
    }
    if (step + STAGES - 1 < steps) {
      char *const to = pipeline + ring.of(STAGES - 1);
      weight.stage(layer, to, pitch_of<D>(DEPTH_FASTEST, 0));
      weight.next_columns();
      operand.load(step + STAGES - 1, to + H::weight_bytes);
    }
    copy_commit();
    if (step >= -1 && step + 1 < steps)
      operand.make(step + 1, pipeline + ring.of(1) + H::weight_bytes, operands + (H::operand_bytes - now));
    if (step >= 0) tile.add_product(pipeline + ring.of(0), operands + now);
    ring.next();
    now = H::operand_bytes - now; /* of the two operands the one that is multiplied */
  } while (++step < steps);
  copy_wait<0>();
  __syncthreads();

  R *const sums = reinterpret_cast<R *>(pipeline);
  const bool outputs_fastest =
      layer.output_staging == STAGE_ELEMENTS ? layer.output_channels_fastest : layer.output_staging == STAGE_CHANNELS;
  if (outputs_fastest)
    tile.each([&](int row, int column, R value) { sums[column * H::pitch_outputs + row] = value; });
  else
    tile.each([&](int row, int column, R value) { sums[row * H::pitch_pixels + column] = value; });
  __syncthreads();
  D *const output = reinterpret_cast<D *>(layer.output.data);
  constexpr int RUN_OUT = Depth<D>::vector;
  if (layer.output_staging == STAGE_PIXELS) {
    /* A thread keeps its pixels and goes through the outputs, 16 bytes at a time. */
    constexpr int CHUNKS = S::columns / RUN_OUT, STEP = S::threads / CHUNKS;
    const int pixel = thread % CHUNKS * RUN_OUT;
    if (pixel >= columns) return;
    D *to = output + table[pixel].output + (output_first + thread / CHUNKS) * layer.output.channel;
    for (int row = thread / CHUNKS; row < rows; row += STEP) {
      store_vector(to, sums + row * H::pitch_pixels + pixel);
      to += STEP * layer.output.channel;
    }
    return;
  }
  if (layer.output_staging == STAGE_CHANNELS && rows % RUN_OUT == 0) {
    constexpr int CHUNKS = S::rows / RUN_OUT, STEP = S::threads / CHUNKS;
    const int row = thread % CHUNKS * RUN_OUT;
    if (row >= rows) return;
    for (int column = thread / CHUNKS; column < columns; column += STEP)
      store_vector(output + table[column].output + output_first + row, sums + column * H::pitch_outputs + row);
    return;
  }
#pragma unroll 1
  for (int i = thread; i < S::rows * S::columns; i += S::threads) {
    const int row = outputs_fastest ? i % S::rows : i / S::columns;
    const int column = outputs_fastest ? i / S::rows : i % S::columns;
    if (row >= rows || column >= columns) continue;
    const R value = sums[outputs_fastest ? column * H::pitch_outputs + row : row * H::pitch_pixels + column];
    const int64_t at = table[column].output + (output_first + row) * layer.output.channel;
    output[at] = round_to(D{}, value);
  }
}

template <class D, class S, Way WAY>
Status launch(const Layer &layer, Stream stream) {
  const int64_t rows = ceil_div(layer.group_outputs, S::rows), columns = ceil_div(layer.columns, S::columns);
  const int64_t tiles = rows * columns * layer.groups;
  const size_t shared = static_cast<size_t>(Shape<D, S>::bytes(layer.input_float ? 4 : static_cast<int>(sizeof(D))));
  Status status = STATUS_OK;
  for (int64_t first = 0; first < tiles && status == STATUS_OK; first += GRID_MOST) {
    const int64_t blocks = tiles - first < GRID_MOST ? tiles - first : GRID_MOST;
    const auto kernel = forward_kernel<D, S, WAY>;
    PNN_LAUNCH(status, kernel, blocks, S::threads, shared, stream, layer, first, divider_make(rows),
               divider_make(columns));
  }
  return status;
}

template <class D, class S>
Status choose_way(const Layer &layer, Stream stream) {
  const Way way = way_of<D>(layer);
  if constexpr (sizeof(D) < 8) {
    if (way == PLAIN_PIXELS) return launch<D, S, PLAIN_PIXELS>(layer, stream);
    if (way == PLAIN_CHANNELS) return launch<D, S, PLAIN_CHANNELS>(layer, stream);
  }
  return launch<D, S, ANY_WAY>(layer, stream);
}

template <class D>
Status choose(const Layer &layer, Stream stream) {
  if (!layer.input_float && layer.group_outputs > Small::rows && enough_blocks(layer, layer.group_outputs))
    return choose_way<D, Large>(layer, stream);
  return choose_way<D, Small>(layer, stream);
}

template <class D, class S>
void list(Visit visit, const std::string &name) {
  constexpr int size = static_cast<int>(sizeof(D));
  for (const char *way : {"", " pixels", " channels"})
    if (size < 8 || !*way) visit((name + way).c_str(), S::threads, Shape<D, S>::bytes(size));
}

}  // namespace

void list_forward(Visit visit) {
  list<float, Large>(visit, "forward float Large");
  list<float, Small>(visit, "forward float Small");
  list<double, Small>(visit, "forward double Small");
  list<tf32, Large>(visit, "forward tf32 Large");
  list<tf32, Small>(visit, "forward tf32 Small");
  list<bfloat16, Large>(visit, "forward bfloat16 Large");
  list<bfloat16, Small>(visit, "forward bfloat16 Small");
  list<float16, Large>(visit, "forward float16 Large");
  list<float16, Small>(visit, "forward float16 Small");
}

Status run_forward(const Layer &layer, int product, Stream stream) {
  switch (product) {
    case PRODUCT_TF32: return choose<tf32>(layer, stream);
    case PNN_FLOAT32: return choose<float>(layer, stream);
    case PNN_FLOAT64: return choose_way<double, Small>(layer, stream);
    case PNN_BFLOAT16: return choose<bfloat16>(layer, stream);
    default: return choose<float16>(layer, stream);
  }
}

}  // namespace pnn_cuda
