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
  static constexpr int table_bytes = STAGES * DEPTH * static_cast<int>(sizeof(Column));
  static int bytes(int input_size) {
    return table_bytes + STAGES * (gradient_bytes + input_bytes(input_size)) + 2 * operand_bytes;
  }
};

template <class D, class S, Fastest G>
__global__ void __launch_bounds__(S::threads, S::blocks)
    weight_gradient_kernel(const __grid_constant__ Layer layer, const __grid_constant__ Grid grid) {
  using H = Shape<D, S, G>;
  using R = typename H::R;
  constexpr int DEPTH = H::DEPTH;
  PNN_SHARED_MEMORY(memory);
  const int input_size = layer.input_float ? 4 : static_cast<int>(sizeof(D));
  const int stage_bytes = H::gradient_bytes + H::input_bytes(input_size);
  Column *const tables = reinterpret_cast<Column *>(memory);
  char *const pipeline = memory + H::table_bytes;
  char *const operands = pipeline + STAGES * stage_bytes;
  const int thread = static_cast<int>(threadIdx.x);
  const uint64_t seed = seed_read(layer);

  int64_t output_tile, map_tile, group;
  const int64_t split = divide(
      grid.by_groups,
      divide(grid.by_maps, divide(grid.by_outputs, grid.first_tile + blockIdx.x, &output_tile), &map_tile), &group);
  const int64_t t0 = output_tile * S::rows, k0 = map_tile * S::columns;
  const int64_t q_begin = split * layer.split_columns;
  const int64_t q_end = q_begin + layer.split_columns < layer.columns ? q_begin + layer.split_columns : layer.columns;
  const int64_t channel_first = group * layer.group_channels, map_first = group * layer.group_maps;
  const int64_t output_first = group * layer.group_outputs;
  const int64_t maps = layer.group_maps - k0 < S::columns ? layer.group_maps - k0 : S::columns;
  const bool products = layer.products != nullptr, totals = layer.totals != nullptr && map_tile == 0;

  const int64_t steps = q_begin < q_end ? (q_end - q_begin + DEPTH - 1) / DEPTH : 0;
  const int staging = layer.input_staging;
  const Map map_of_tile = map_make(layer, k0);
  int64_t c0 = map_of_tile.c;
  int channels = 0;
  if (products && maps > 0) channels = static_cast<int>(map_make(layer, k0 + maps - 1).c + 1 - c0);
  const int V = 16 / input_size;
  if (staging == STAGE_CHANNELS) {
    channels += static_cast<int>(c0 & (V - 1));
    channels = (channels + V - 1) & -V;
    c0 &= -static_cast<int64_t>(V);
  }
  const int pitch = (staging == STAGE_PIXELS ? DEPTH : static_cast<int>(S::columns)) * input_size + 16;

  Slot<STAGES> look_up_slot, load_slot, transform_slot, product_slot;
  const auto pixels_of = [&](int64_t step) {
    const int64_t left = q_end - q_begin - step * DEPTH;
    return left < DEPTH ? static_cast<int>(left) : DEPTH;
  };
  /* Where a step's pixels stand: made once, one step before the step is loaded. */
  const auto look_up = [&](int64_t step) {
    const int slot = look_up_slot.at;
    look_up_slot.next();
    if (step >= steps || thread >= pixels_of(step)) return;
    const Place p = place_make(layer, q_begin + step * DEPTH + thread);
    tables[slot * DEPTH + thread] = {place_in(layer.input, p), place_in(layer.grad_output, p), pixel_make(layer, p)};
  };
  const auto load = [&](int64_t step) {
    if (step < steps) {
      char *const to = pipeline + load_slot.at * stage_bytes;
      const Column *const table = tables + load_slot.at * DEPTH;
      load_slot.next();
      const int pixels = pixels_of(step);
      const int order = G == ROWS_FASTEST                           ? STAGE_CHANNELS
                        : layer.grad_output_staging == STAGE_PIXELS ? STAGE_PIXELS
                                                                    : STAGE_ELEMENTS;
      stage_view<sizeof(D), S::rows, DEPTH, S::threads>(layer.grad_output, order, t0, S::rows, layer.group_outputs,
                                                        output_first, to, pitch_of<D>(G, S::rows),
                                                        [&](int j, int64_t *at) {
                                                          *at = j < pixels ? table[j].grad_output : 0;
                                                          return j < pixels;
                                                        });
      if (products && staging != STAGE_ELEMENTS) {
        const auto place = [&](int j, int64_t *at) {
          *at = j < pixels ? table[j].input : 0;
          return j < pixels;
        };
        if (input_size == static_cast<int>(sizeof(D)))
          stage_view<sizeof(D), S::columns, DEPTH, S::threads>(layer.input, staging, c0, channels, layer.group_channels,
                                                               channel_first, to + H::gradient_bytes, pitch, place);
        else
          stage_view<4, S::columns, DEPTH, S::threads>(layer.input, staging, c0, channels, layer.group_channels,
                                                       channel_first, to + H::gradient_bytes, pitch, place);
      }
    }
    copy_commit();
  };
  /* A thread makes RUNS runs of maps of one pixel, of the same maps in every step. */
  constexpr int RUNS = DEPTH * (S::columns / RUN) > S::threads ? 2 : 1;
  static_assert(DEPTH * (S::columns / RUN / RUNS) <= S::threads, "one item for a thread");
  const int j = thread % DEPTH, first_run = thread / DEPTH * (RUN * RUNS);
  const Map map_of_thread = map_make(layer, k0 + first_run);
  constexpr int SIZE = static_cast<int>(sizeof(D)), PITCH = DEPTH * SIZE + 16;
  const bool plain = staging != STAGE_ELEMENTS && plain_layer<D>(layer);
  const R zeros[RUN] = {};
  const auto transform = [&](int64_t step) {
    const char *const raw = pipeline + transform_slot.at * stage_bytes + H::gradient_bytes;
    const Column &column = tables[transform_slot.at * DEPTH + j];
    transform_slot.next();
    if (first_run >= S::columns) return;
    D *const to =
        reinterpret_cast<D *>(operands + (step & 1) * H::operand_bytes + j * pitch_of<D>(ROWS_FASTEST, S::columns));
    const int pixels = pixels_of(step);
    if constexpr (sizeof(D) < 8) {
      if (plain) {
        if (j >= pixels || first_run >= maps) {
#pragma unroll
          for (int run = 0; run < RUN * RUNS; run += RUN) store_run(to + first_run + run, zeros);
          return;
        }
        const bool in_pixels = staging == STAGE_PIXELS;
        const int first = static_cast<int>(map_of_thread.c - c0) * (in_pixels ? PITCH : SIZE) +
                          j * (in_pixels ? SIZE : S::columns * SIZE + 16);
        plain_response<D, RUN * RUNS, PITCH>(layer, seed, map_first + k0 + first_run, column.pixel.row,
                                             column.pixel.column, raw + first, in_pixels, to + first_run);
        return;
      }
    }
    Map map = map_of_thread;
    Generated last = nothing_generated();
#pragma unroll 1
    for (int run = first_run; run < first_run + RUN * RUNS; run += RUN) {
      const int64_t left = maps - run;
      const int count = j >= pixels || left <= 0 ? 0 : left < RUN ? static_cast<int>(left) : RUN;
      R u[RUN];
      if (count > 0) {
        const int64_t k = map_first + k0 + run;
        const Map in_layer = {channel_first + map.c, map.m};
        if (staging == STAGE_ELEMENTS) {
          const Source<int64_t> x = source_in<D>(layer, column.input, in_layer.c);
          perturbed<D>(layer, seed, x, k, in_layer, count, column.pixel, &last, u);
        } else {
          const int step_bytes = staging == STAGE_PIXELS ? pitch : input_size;
          const int first =
              static_cast<int>(map.c - c0) * step_bytes + j * (staging == STAGE_PIXELS ? input_size : pitch);
          const Source<int> x = {raw + first, step_bytes};
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
  };

  Tile<D, S::rows, S::columns, S::threads, G, ROWS_FASTEST> tile;
  tile.start([](int) { return R(0); });
  R total = 0;
  look_up(0);
  __syncthreads();
#pragma unroll 1
  for (int64_t step = 1 - STAGES; step < steps; step++) {
    if (step >= -1) {
      copy_wait<STAGES - 3>();
      __syncthreads();
    }
    load(step + STAGES - 1);
    look_up(step + STAGES);
    if (products && step >= -1 && step + 1 < steps) transform(step + 1);
    if (step < 0) continue;
    const char *const gradient = pipeline + product_slot.at * stage_bytes;
    product_slot.next();
    if (products) tile.add_product(gradient, operands + (step & 1) * H::operand_bytes);
    if (totals && thread < S::rows) {
#pragma unroll
      for (int j = 0; j < DEPTH; j++) {
        const char *at = G == DEPTH_FASTEST
                             ? gradient + thread * pitch_of<D>(G, S::rows) + j * static_cast<int>(sizeof(D))
                             : gradient + j * pitch_of<D>(G, S::rows) + thread * static_cast<int>(sizeof(D));
        total += widen(*reinterpret_cast<const D *>(at));
      }
    }
  }
  copy_wait<0>();

  if (totals && thread < S::rows && t0 + thread < layer.group_outputs)
    static_cast<R *>(layer.totals)[split * layer.outputs + output_first + t0 + thread] = total;
  if (!products) return;
  R *const out = static_cast<R *>(layer.products) + (split * layer.outputs + output_first + t0) * layer.group_maps + k0;
  const int64_t rows = layer.group_outputs - t0;
  tile.each([&](int row, int column, R value) {
    if (row < rows && column < maps) out[row * layer.group_maps + column] = value;
  });
}

template <class D, class S, Fastest G>
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
    const auto kernel = weight_gradient_kernel<D, S, G>;
    PNN_LAUNCH(status, kernel, blocks, S::threads, shared, stream, layer, grid);
  }
  return status;
}

template <class D, class S>
Status choose_order(const Layer &layer, Stream stream) {
  if (layer.grad_output_staging == STAGE_CHANNELS) return launch<D, S, ROWS_FASTEST>(layer, stream);
  return launch<D, S, DEPTH_FASTEST>(layer, stream);
}

template <class D>
Status choose(const Layer &layer, Stream stream) {
  if (!layer.input_float && layer.group_outputs > Small::rows && layer.group_maps > Small::columns)
    return choose_order<D, Large<D>>(layer, stream);
  return choose_order<D, Small>(layer, stream);
}

template <class D, class S, Fastest G>
void list_one(Visit visit, const std::string &name) {
  visit((name + (G == DEPTH_FASTEST ? " depth" : " rows")).c_str(), S::threads,
        Shape<D, S, G>::bytes(static_cast<int>(sizeof(D))));
}
template <class D, class S>
void list(Visit visit, const char *name) {
  list_one<D, S, DEPTH_FASTEST>(visit, name);
  list_one<D, S, ROWS_FASTEST>(visit, name);
}

}  // namespace

void list_weight_gradient(Visit visit) {
  list<float, Large<float>>(visit, "weight_gradient float Large");
  list<float, Small>(visit, "weight_gradient float Small");
  list<double, Small>(visit, "weight_gradient double Small");
  list<tf32, Large<tf32>>(visit, "weight_gradient tf32 Large");
  list<tf32, Small>(visit, "weight_gradient tf32 Small");
  list<bfloat16, Large<bfloat16>>(visit, "weight_gradient bfloat16 Large");
  list<bfloat16, Small>(visit, "weight_gradient bfloat16 Small");
  list<float16, Large<float16>>(visit, "weight_gradient float16 Large");
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
