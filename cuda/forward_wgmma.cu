/*
 * forward_wgmma.cu - forward of plain layers (response.h) in 16-bit types and TF32 by Hopper's asynchronous products,
 * for sm_90a alone.
 *
 * As in forward.cu, y = start + V * response(x), but transposed: D [pixel][output] += A [pixel][map] * B [map][output],
 * 64 pixels to a warpgroup. A is made in the very registers from which the tensor cores read it, so that it never goes
 * to shared memory and nothing waits for it; B, which is V, comes from there by itself. A product runs while the same
 * threads make the operand of the next ones:
 *
 *     x --ld.global, a part ahead--> registers --masks, relu, rounding--> A, four products in turn --> wgmma
 *     V --cp.async, two parts ahead--> shared memory, in wgmma's order -------------------------------^
 *
 * A step's part, four products, is all of it in 16-bit types, half of it in TF32.
 *
 * Depths, rows and columns of a product stand in the order of wgmma.h:
 *
 *     depths   thread t's, of a step's products together, are the maps 16 t to 16 t + 15: one Philox call's
 *     rows     g and g + 8 are neighbouring pixels: one word of x and of y, two of TF32
 *     columns  thread t's, of 32, are the outputs 8 t to 8 t + 7: 16 or 32 bytes of y where the channels are contiguous
 *
 * wgmma_weight_kernel copies V into this order. With normalisation, CENTRED, the operand is the response minus its
 * mean.
 */
#include <string>

#include "kernels.h"
#include "response.h"
#include "wgmma.h"

namespace pnn_cuda {
namespace {

constexpr int STAGES =
    4; /* of V: of the last part, whose products may still run, of this one, and of two on their way */

/* Tiles: as many outputs as registers hold sums of, and so many warpgroups that V travels seldom and that a
 * multiprocessor's registers are used. (`blocks` to it is read by the device's compiler alone.) */
struct Wide {
  [[maybe_unused]] static constexpr int outputs = 256, warpgroups = 2, blocks = 1;
};
struct Middle {
  [[maybe_unused]] static constexpr int outputs = 128, warpgroups = 1, blocks = 3;
};
struct Narrow {
  [[maybe_unused]] static constexpr int outputs = 64, warpgroups = 1, blocks = 4;
};

template <class S>
struct Shape {
  static constexpr int threads = 128 * S::warpgroups, columns = 64 * S::warpgroups;
  static constexpr int stage_bytes = PART_RUNS * S::outputs * 16;
  static constexpr int start_bytes = S::outputs * static_cast<int>(sizeof(float));
  static constexpr int bytes = start_bytes + STAGES * stage_bytes;
};

/* ---- the kernel ---- */

/* What a thread knows of its two pixels. */
struct Pair {
  uint32_t row[2], column[2];
  const char *input[2];
};

/* A word of A: of two responses of a pixel or, of TF32, one. */
template <class D>
PNN_DEVICE uint32_t operand_relu(const float (&u)[NUMBERS<D>]) {
  if constexpr (NUMBERS<D> == 2)
    return round_pair_relu(D{}, u[0], u[1]);
  else
    return to_tf32_even_relu(u[0]);
}
template <class D>
PNN_DEVICE uint32_t operand(const float (&u)[NUMBERS<D>]) {
  if constexpr (NUMBERS<D> == 2)
    return round_pair(D{}, u[0], u[1]);
  else
    return to_tf32_even(u[0]);
}

/* d += A * B over all maps of the group; `ring` has room for STAGES parts of V, which starts at `weight`. */
template <class D, class S, Reading READING, bool CENTRED, int MASKS>
PNN_DEVICE void add_products(const Layer &layer, int64_t group, const Pair &pair, const char *weight, char *ring,
                             float (&d)[S::outputs / 2]) {
  using H = Shape<S>;
  constexpr int CHUNKS = H::stage_bytes / 16;
  const int thread = thread_index(), quad = thread % 4;
  constexpr int MAPS = SIXTEEN / PARTS<D>, EACH = MAPS / PRODUCTS; /* this thread's of a part, of a product */
  const int steps = static_cast<int>((layer.group_maps + STEP - 1) / STEP), maps = static_cast<int>(layer.group_maps);
  const int parts = steps * PARTS<D>;
  const auto stage = [&](int part) {
    const char *const from = weight + static_cast<int64_t>(part) * H::stage_bytes;
    char *const to = ring + part % STAGES * H::stage_bytes;
#pragma unroll
    for (int i = 0; i < CHUNKS; i += H::threads)
      if (CHUNKS % H::threads == 0 || i + thread < CHUNKS)
        copy_async16(to + (i + thread) * 16, from + (i + thread) * 16, 16);
  };

  /* As many keys as there are registers for. */
  constexpr bool NARROW = S::outputs == Narrow::outputs;
  const PairKeys<sizeof(D) == 2 ? (CENTRED && NARROW ? 2 : 1) : NARROW ? 5 : 2> keys(seed_read(layer));
  uint32_t block = static_cast<uint32_t>(group * layer.group_maps / 16) + static_cast<uint32_t>(quad);
  constexpr bool ONE_POINTER = READING == READ_PIXELS;
  constexpr int SIZE = static_cast<int>(sizeof(D));
  const int64_t channel = (READING == READ_CHANNELS ? 1 : layer.input.channel) * SIZE; /* bytes */
  const char *from[2] = {pair.input[0], pair.input[1]};
  int k = quad * 16;      /* of the part whose x is loaded next */
  uint32_t first_map = 0; /* of this step, as the means are numbered */
  InputsOf<D, READING, MASKS, MAPS> x;
  const auto move_to = [&](int k_) { /* beyond the maps to the first one, which is not used */
                                     const int64_t c = (k_ < maps ? k_ : 0) >> layer.masks_shift;
                                     from[0] = pair.input[0] + c * channel;
                                     if (!ONE_POINTER) from[1] = pair.input[1] + c * channel;
  };
  move_to(k);
  x.load(0, from, channel);
  x.load(1, from, channel);
#pragma unroll 1
  for (int part = 0; part < STAGES - 2; part++) {
    if (part < parts) stage(part);
    copy_commit();
  }
  /* Operands: of as many products as there are registers for. */
  constexpr int OPERANDS = sizeof(D) == 4 && READING == READ_CHANNELS && !CENTRED ? 2 : PRODUCTS;
  uint32_t operands[OPERANDS][4];
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    uint32_t words[2][4];
    float level = layer.level_float;
#pragma unroll
    for (int in_step = 0; in_step < PARTS<D>; in_step++) {
      const int part = step * PARTS<D> + in_step;
      copy_wait<STAGES - 3>(); /* this part's V is there */
      shared_to_products();
      __syncthreads(); /* all threads' share of it; and no product of the part before the last one runs */
      if (part + STAGES - 2 < parts) stage(part + STAGES - 2);
      copy_commit();
      static_assert(NO_MAPS >= SIXTEEN, "zeros for a thread's depths of a step");
      if (CENTRED && in_step == 0) first_map = k < maps ? block * 16 : static_cast<uint32_t>(layer.maps); /* zeros */
      if (k >= maps) level = 0, x.clear(); /* as V is: no infinity may meet its zeros */
      if (in_step == 0) {
#pragma unroll
        for (int p = 0; p < 2; p++)
          words[p][0] = pair.column[p], words[p][1] = pair.row[p], words[p][2] = block, words[p][3] = 0;
        keys.philox(words);
        block += STEP / 16;
      }
      k += in_step + 1 < PARTS<D> ? MAPS : STEP - (SIXTEEN - MAPS);
      move_to(k);
      const char *const v = ring + part % STAGES * H::stage_bytes;
      Four center = {};
#pragma unroll
      for (int product = 0; product < PRODUCTS; product++) {
        const int first = in_step * MAPS + product * EACH; /* of the sixteen maps */
        if (CENTRED && first % 4 == 0) center = four_from(layer.mean, first_map + static_cast<uint32_t>(first));
        uint32_t(&a)[4] = operands[product % OPERANDS];
        products_wait<OPERANDS - 1>(); /* the one that read them is done */
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int p = i % 2, at = i / 2 * NUMBERS<D>; /* in the product's maps */
          float u[NUMBERS<D>];
#pragma unroll
          for (int e = 0; e < NUMBERS<D>; e++) {
            const int map = first + at + e;
            u[e] = x.value(p, product * EACH + at + e) + level * lattice_in(words[p][map / 4], map % 4);
            if (CENTRED) u[e] = relu_any_zero(u[e]) - center.of[map % 4];
          }
          a[i] = CENTRED ? operand<D>(u) : operand_relu<D>(u);
        }
        products_operand(a);
        products_add(D{}, d, a, matrix_descriptor(v + product * 2 * S::outputs * 16, S::outputs * 16, 128));
        products_commit();
        if (product % 2) x.load(product / 2, from, channel);
      }
    }
  }
  products_finish(d);
}

/* Elements on their way take registers that words share; of TF32 there is no room for means. */
template <class D, class S, Reading READING, bool CENTRED>
constexpr int blocks_of() {
  const bool fewer = READING == READ_ELEMENTS || (sizeof(D) == 4 && CENTRED);
  return fewer && S::blocks > 1 ? S::blocks - 1 : S::blocks;
}

template <class D, class S, Reading READING, bool CENTRED>
__global__ void __launch_bounds__(Shape<S>::threads, (blocks_of<D, S, READING, CENTRED>()))
    forward_wgmma_kernel(const __grid_constant__ Layer layer, int64_t first_tile,
                         const __grid_constant__ Divider by_rows, const __grid_constant__ Divider by_columns) {
  using H = Shape<S>;
  PNN_SHARED_MEMORY(memory);
  float *const start = reinterpret_cast<float *>(memory);
  char *const ring = memory + H::start_bytes;
  const int thread = thread_index(), quad = thread % 4;

  int64_t row_tile, column_tile;
  const int64_t group =
      divide<true>(by_columns, divide<true>(by_rows, first_tile + blockIdx.x, &row_tile), &column_tile);
  const int64_t t0 = row_tile * S::outputs, q0 = column_tile * H::columns;
  const int columns = layer.columns - q0 < H::columns ? static_cast<int>(layer.columns - q0) : H::columns;
  const int rows =
      layer.group_outputs - t0 < S::outputs ? static_cast<int>(layer.group_outputs - t0) : static_cast<int>(S::outputs);
  const int64_t output_first = group * layer.group_outputs + t0;

  const D *const bias = reinterpret_cast<const D *>(layer.bias);
  for (int i = thread; i < S::outputs; i += H::threads) {
    start[i] = 0;
    if (i >= rows) continue;
    if (CENTRED)
      start[i] = static_cast<const float *>(layer.start)[output_first + i];
    else if (bias)
      start[i] = widen(bias[(output_first + i) * layer.bias_step]);
  }
  /* Threads without a pixel make one's operand again, and write nothing. */
  const int first = thread / 32 * 16 + thread % 32 / 4 * 2;
  Pair pair;
  D *output[2];
#pragma unroll
  for (int p = 0; p < 2; p++) {
    const Place place = place_make<true>(layer, q0 + (first + p < columns ? first + p : 0));
    const Pixel pixel = pixel_make(layer, place);
    pair.row[p] = pixel.row, pair.column[p] = pixel.column;
    pair.input[p] =
        layer.input.data + (place_in(layer.input, place) + group * layer.group_channels * layer.input.channel) *
                               static_cast<int>(sizeof(D));
    output[p] =
        reinterpret_cast<D *>(layer.output.data) + place_in(layer.output, place) + output_first * layer.output.channel;
  }
  __syncthreads();
  float d[S::outputs / 2];
#pragma unroll
  for (int b = 0; b < S::outputs / 32; b++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float value = load_shared(start + b * 32 + quad * 8 + i);
      d[b * 16 + i / 2 * 4 + i % 2] = d[b * 16 + i / 2 * 4 + 2 + i % 2] = value;
    }
  products_start(d);

  const int64_t parts = (layer.group_maps + STEP - 1) / STEP * PARTS<D>;
  const char *const weight =
      layer.weight + (group * static_cast<int64_t>(by_rows.divisor) + row_tile) * parts * H::stage_bytes;
  if (layer.masks_shift == 0)
    add_products<D, S, READING, CENTRED, 1>(layer, group, pair, weight, ring, d);
  else if (layer.masks_shift == 1)
    add_products<D, S, READING, CENTRED, 2>(layer, group, pair, weight, ring, d);
  else if (layer.masks_shift == 2)
    add_products<D, S, READING, CENTRED, 4>(layer, group, pair, weight, ring, d);
  else if (layer.masks_shift == 3 || PARTS<D> == 2) /* a part's maps have one channel */
    add_products<D, S, READING, CENTRED, 8>(layer, group, pair, weight, ring, d);
  else if constexpr (PARTS<D> == 1)
    add_products<D, S, READING, CENTRED, 16>(layer, group, pair, weight, ring, d);

  if (in_pairs<D>(layer.output_staging)) {
    if (first >= columns) return;
    const int left = rows - quad * 8;
    D *to = output[0] + quad * 8 * layer.output.channel;
#pragma unroll
    for (int b = 0; b < S::outputs / 32; b++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float *const sums = d + b * 16 + i / 2 * 4 + i % 2;
        store_pair_if<D>(b * 32 + i < left, to, sums[0], sums[2]);
        to += layer.output.channel;
      }
      to += 24 * layer.output.channel;
    }
    return;
  }
  const bool vectors = layer.output_staging == STAGE_CHANNELS && layer.group_outputs % 8 == 0;
#pragma unroll
  for (int p = 0; p < 2; p++) {
    if (first + p >= columns) return;
#pragma unroll
    for (int b = 0; b < S::outputs / 32; b++) {
      float sums[8];
#pragma unroll
      for (int i = 0; i < 8; i++) sums[i] = d[b * 16 + i / 2 * 4 + 2 * p + i % 2];
      const int row = b * 32 + quad * 8;
      D *const to = output[p] + row * layer.output.channel;
      if (vectors) {
        if (row < rows) store_together<D, 8>(reinterpret_cast<char *>(to), sums);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (row + i < rows) to[i * layer.output.channel] = round_to(D{}, sums[i]);
    }
  }
}

/* ---- the host's side ---- */

/* The widest tile that the outputs fill by more than half and that gives a large GPU enough blocks. Results do not
 * depend on it. */
template <class S>
bool is_chosen(const Layer &layer) {
  return layer.group_outputs > S::outputs / 2 &&
         ceil_div(layer.group_outputs, S::outputs) * ceil_div(layer.columns, Shape<S>::columns) * layer.groups >=
             wanted_blocks();
}

template <class D, class S, Reading READING, bool CENTRED>
Status launch(const Layer &layer, Stream stream) {
  using H = Shape<S>;
  const int64_t rows = ceil_div(layer.group_outputs, S::outputs), columns = ceil_div(layer.columns, H::columns);
  const int64_t tiles = rows * columns * layer.groups;
  Status status = STATUS_OK;
  for (int64_t first = 0; first < tiles && status == STATUS_OK; first += GRID_MOST) {
    const int64_t blocks = tiles - first < GRID_MOST ? tiles - first : GRID_MOST;
    const auto kernel = forward_wgmma_kernel<D, S, READING, CENTRED>;
    PNN_LAUNCH(status, kernel, blocks, H::threads, H::bytes, stream, layer, first, divider_make(rows),
               divider_make(columns));
  }
  return status;
}

template <class D, class S, bool CENTRED>
Status choose_reading(const Layer &layer, Stream stream) {
  switch (reading_of<D>(layer.input_staging, layer.group_channels)) {
    case READ_PIXELS: return launch<D, S, READ_PIXELS, CENTRED>(layer, stream);
    case READ_CHANNELS: return launch<D, S, READ_CHANNELS, CENTRED>(layer, stream);
    default: return launch<D, S, READ_ELEMENTS, CENTRED>(layer, stream);
  }
}

template <class D, class S>
Status run(const Layer &layer, Matrix weight, const double *scale, void *copy, Stream stream) {
  const WeightOrder order = {layer.groups,
                             layer.group_outputs,
                             layer.group_maps,
                             layer.group_outputs * weight.step[0],
                             weight.step[0],
                             weight.step[1],
                             scale};
  const Status status = run_wgmma_weight<D, S::outputs, 32, false>(order, weight.data, copy, stream);
  if (status != STATUS_OK) return status;
  Layer copied = layer;
  copied.weight = static_cast<const char *>(copy);
  return layer.mean ? choose_reading<D, S, true>(copied, stream) : choose_reading<D, S, false>(copied, stream);
}

template <class D>
Status choose(const Layer &layer, Matrix weight, const double *scale, void *copy, Stream stream) {
  if (is_chosen<Wide>(layer)) return run<D, Wide>(layer, weight, scale, copy, stream);
  if (is_chosen<Middle>(layer)) return run<D, Middle>(layer, weight, scale, copy, stream);
  return run<D, Narrow>(layer, weight, scale, copy, stream);
}

template <class S>
void list(Visit visit, const std::string &name) {
  for (const char *way : {" pixels", " channels", " elements"})
    for (const char *kind : {"", " centred"}) visit((name + way + kind).c_str(), Shape<S>::threads, Shape<S>::bytes);
}

}  // namespace

bool forward_wgmma_fits(const Layer &layer, int product) {
  if (product != PNN_BFLOAT16 && product != PNN_FLOAT16 && product != PRODUCT_TF32) return false;
  return is_plain<bfloat16>(layer) && layer.group_outputs > Narrow::outputs / 2 && layer.columns > 0 && has_wgmma();
}

int64_t wgmma_weight_elements(int64_t groups, int64_t columns, int64_t depth) {
  const int64_t whole = ceil_div(columns, Wide::outputs) * Wide::outputs; /* the other tiles' are no more */
  int64_t count;
  if (__builtin_mul_overflow(groups * whole, ceil_div(depth, STEP) * STEP, &count)) return INT64_MAX;
  return count;
}

void list_forward_wgmma(Visit visit) {
  for (const std::string type : {"bfloat16", "float16", "tf32"}) {
    list<Wide>(visit, "forward_wgmma " + type + " Wide");
    list<Middle>(visit, "forward_wgmma " + type + " Middle");
    list<Narrow>(visit, "forward_wgmma " + type + " Narrow");
  }
}

Status run_forward_wgmma(const Layer &layer, int product, Matrix weight, const double *scale, void *copy,
                         Stream stream) {
  if (product == PNN_BFLOAT16) return choose<bfloat16>(layer, weight, scale, copy, stream);
  if (product == PNN_FLOAT16) return choose<float16>(layer, weight, scale, copy, stream);
  return choose<tf32>(layer, weight, scale, copy, stream);
}

}  // namespace pnn_cuda
