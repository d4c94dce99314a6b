/*
 * input_gradient_wgmma.cu - dx of plain layers (response.h) in 16-bit types and TF32 by Hopper's asynchronous products,
 * for sm_90a alone.
 *
 * As in input_gradient.cu, da = V'g, then through relu's derivative and summed over a channel's masks, but transposed:
 * D [pixel][map] += A [pixel][output] * B [output][map], 64 pixels to a warpgroup. A is g, in the very registers from
 * which the tensor cores read it; B is V, all outputs of a block's maps, which stay in shared memory while the block
 * goes through its pixels: after one barrier in the beginning its warpgroups never wait for each other, so that one
 * goes from da to dx while another's products run.
 *
 *     g --ld.global, a part ahead--> registers: A, four products in turn --> wgmma --> D, da
 *     V --cp.async, once--> shared memory, in wgmma's order -----------------^         |
 *     x --ld.global, before the products or 64 maps ahead--> registers, with masks: u  +--> relu', sums --> dx
 *
 * A step's part, four products, is all of it in 16-bit types, half of it in TF32. Depths, rows and columns of a product
 * stand in the order of wgmma.h:
 *
 *     depths   thread t's, of a step's four products together, are the outputs 16 t to 16 t + 15
 *     rows     g and g + 8 are neighbouring pixels: one word (two of TF32) of g, x and dx where they are contiguous
 *     columns  thread t's, of 64, are the maps 16 t to 16 t + 15: one Philox call's
 *
 * d's sum over masks has one order: in a thread map by map, then, of 32 and 64 masks, over the two or four threads.
 */
#include <string>

#include "kernels.h"
#include "response.h"
#include "tile.h"
#include "wgmma.h"

namespace pnn_cuda {
namespace {

constexpr uint32_t PIXELS = 64; /* of a warpgroup's tile */

/* Tiles: as many maps as registers hold sums of, and warpgroups that use a multiprocessor's registers: one block to
 * each. In training (AFFINE below) a thread needs more of them: there are fewer warpgroups, the second number, or no
 * such tile. Of TF32 it does so in evaluation, too, and the second number is that of channels-last g as well. */
struct Wide {
  static constexpr int maps = 256, warpgroups[] = {2, 0}, warpgroups_tf32[] = {0, 0};
};
struct Middle {
  static constexpr int maps = 128, warpgroups[] = {3, 2}, warpgroups_tf32[] = {3, 2};
};
struct Narrow {
  static constexpr int maps = 64, warpgroups[] = {4, 3}, warpgroups_tf32[] = {3, 3};
};
template <class D, class S>
constexpr int warpgroups_of(bool affine, Fastest g) {
  return sizeof(D) == 2 ? S::warpgroups[affine] : S::warpgroups_tf32[affine || g == DEPTH_FASTEST];
}
/* Of shared memory that V may take: a Hopper block has 227 KiB, of which three numbers of each map may take 3. */
constexpr int64_t MOST_BYTES = 224 * 1024;
template <class S>
constexpr int64_t affine_bytes = S::maps * 3 * 4;

template <class D, class S, Fastest G, bool AFFINE>
struct Shape {
  static constexpr int warpgroups = warpgroups_of<D, S>(AFFINE, G), threads = 128 * warpgroups;
  static constexpr int part_bytes = PART_RUNS * S::maps * 16, step_bytes = PARTS<D> * part_bytes;
};

/* What a launch adds to the layer: the blocks of one piece of the pixels follow each other, one for each tile of maps,
 * so that g comes from the L2 cache but for the first time. The first `more` pieces are of one tile more. */
struct Grid {
  Divider by_rows, by_map_tiles; /* tiles of maps of all groups, of one */
  int tiles, more;
  int64_t input, grad_output, grad_input; /* bytes from channel to channel */
};

/* g of a thread's two pixels and a part's outputs, sixteen or, of TF32, eight, as it comes from memory. A word has two
 * pixels of an output or, where the channels are contiguous, two outputs of a pixel; of TF32, one number. Beyond the
 * outputs A is 0: no infinity may meet V's zeros there. (The channels' words are made zeros when A is made, of any
 * number that is there: were they copied to A as they are, that would be done, and waited for, at the load.) */
template <class D, Fastest G>
struct Operand {
  static constexpr bool ROWS = G == ROWS_FASTEST;
  static constexpr int SIZE = static_cast<int>(sizeof(D)), OUTPUTS = SIXTEEN / PARTS<D>, EACH = OUTPUTS / PRODUCTS;
  uint32_t words[16];
  const char *from[ROWS ? 1 : 2]; /* the next ones */
  int left;                       /* outputs from the next ones on */

  /* The first ones of a tile, of which nothing is read unless `wanted`. */
  PNN_DEVICE void move_to(const Layer &layer, const Grid &grid, int64_t group, const Place place[2], bool wanted) {
    const int quad = thread_index() % 4;
    const View &g = layer.grad_output;
    left = wanted ? static_cast<int>(layer.group_outputs) - quad * 16 : 0;
#pragma unroll
    for (int p = 0; p < (ROWS ? 1 : 2); p++)
      from[p] = g.data + place_in(g, place[p]) * SIZE +
                (group * layer.group_outputs + (left > 0 ? quad * 16 : 0)) * grid.grad_output;
  }
  /* Goes on where `other` is. */
  PNN_DEVICE void follow_if(bool wanted, const Operand &other) {
    left = wanted ? other.left : left;
#pragma unroll
    for (int p = 0; p < (ROWS ? 1 : 2); p++) from[p] = wanted ? other.from[p] : from[p];
  }
  /* What the products `product` of a step's part `part` need, in turn. */
  PNN_DEVICE void load([[maybe_unused]] const Grid &grid, int part, int product) {
    const int onward = part + 1 < PARTS<D> ? OUTPUTS : STEP - SIXTEEN + OUTPUTS; /* to the next part's outputs */
    if constexpr (ROWS) {
#pragma unroll
      for (int i = product * EACH; i < product * EACH + EACH; i++) {
        if constexpr (SIZE == 2) {
          words[i] = load_global_or_zero(i < left, reinterpret_cast<const uint32_t *>(from[0]));
        } else {
          const words2 v = load_global_or_zero(i < left, reinterpret_cast<const words2 *>(from[0]));
          words[2 * i] = v.w[0], words[2 * i + 1] = v.w[1];
        }
        from[0] = keep(from[0] + grid.grad_output); /* or its multiples would wait in registers */
      }
      if (product == PRODUCTS - 1) from[0] += (onward - OUTPUTS) * grid.grad_output;
    } else if (product % 2) { /* 16 bytes of outputs, there or not */
      const int half = product / 2, offset = half && left > OUTPUTS / 2 ? 16 : 0;
      const int step = left > onward ? onward * SIZE : 0;
#pragma unroll
      for (int p = 0; p < 2; p++) {
        const words4 v = load_global(reinterpret_cast<const words4 *>(from[p] + offset));
#pragma unroll
        for (int i = 0; i < 4; i++) words[p * 8 + half * 4 + i] = v.w[i];
        if (half) from[p] += step;
      }
    }
    if (product == PRODUCTS - 1) left -= onward;
  }
  /* A of a product; `here` of the outputs are left from this thread's first one of the part on. */
  PNN_DEVICE void make(int product, int here, uint32_t a[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int p = i % 2, k = product * EACH + i / 2 * NUMBERS<D>;
      if constexpr (ROWS && SIZE == 2)
        a[i] = permute(words[k], words[k + 1], p ? 0x7632 : 0x5410);
      else if constexpr (ROWS)
        a[i] = to_tf32_even(float_of(words[2 * k + p]));
      else
        a[i] = words[p * 8 + k / NUMBERS<D>] & (k / (OUTPUTS / 2) * (OUTPUTS / 2) < here ? 0xffffffffu : 0);
      if constexpr (!ROWS && SIZE == 4) a[i] = to_tf32_even(float_of(a[i]));
    }
  }
};

/* The two pixels of this thread in a tile; those beyond the last column are the first one of all. A plain layer's
 * columns are below 2^31. */
PNN_DEVICE void place_pixels(const Layer &layer, int tile, Place place[2], bool there[2]) {
  const int thread = thread_index() % 128, first = thread / 32 * 16 + thread % 32 / 4 * 2;
#pragma unroll
  for (int p = 0; p < 2; p++) {
    const uint32_t column = static_cast<uint32_t>(tile) * PIXELS + static_cast<uint32_t>(first + p);
    there[p] = column < static_cast<uint32_t>(layer.columns);
    place[p] = place_make<true>(layer, there[p] ? column : 0);
  }
}

/* dx of two pixels' COUNT channels, the first of which is at `to`. */
template <class D, int COUNT>
PNN_DEVICE void store_channels(const Layer &layer, const Grid &grid, char *const to[2], const bool there[2],
                               const float sum[2][COUNT]) {
  if (in_pairs<D>(layer.grad_input_staging)) { /* no image ends inside a pair: both are there or neither */
    char *at = to[0];
#pragma unroll
    for (int c = 0; c < COUNT; c++, at += grid.grad_input) store_pair_if<D>(there[0], at, sum[0][c], sum[1][c]);
    return;
  }
#pragma unroll
  for (int p = 0; p < 2; p++) {
    if (!there[p]) continue;
    if (COUNT == 1 || layer.grad_input_staging != STAGE_CHANNELS) {
      char *at = to[p];
#pragma unroll
      for (int c = 0; c < COUNT; c++, at += grid.grad_input) *reinterpret_cast<D *>(at) = round_to(D{}, sum[p][c]);
    } else if constexpr (COUNT > 1) {
      store_together<D, COUNT>(to[p], sum[p]);
    }
  }
}

/* All of a block: its map tile's V is on its way to `memory`. In training, AFFINE, the maps' means, slopes and offsets
 * stand before it. */
template <class D, class S, Fastest G, Way WAY, bool AFFINE, int MASKS>
PNN_DEVICE void run_block(const Layer &layer, const Grid &grid, int64_t group, int64_t map_first, int tile, int last,
                          char *memory) {
  using H = Shape<D, S, G, AFFINE>;
  constexpr int SIZE = static_cast<int>(sizeof(D));
  constexpr int COUNT = SIXTEEN / MASKS, BLOCKS = S::maps / 64;
  constexpr int STORED = MASKS == 1 ? 8 : COUNT; /* channels whose sums wait in registers for the others */
  const int quad = thread_index() % 4, shift = layer.masks_shift;
  const int steps = static_cast<int>((layer.group_outputs + STEP - 1) / STEP);
  /* This thread's maps are sixteen of each 64 from the first on, of `maps` in all; x of those that aren't there is the
   * last one's that is, or the group's first, and not used. */
  const int first = static_cast<int>(map_first) + quad * 16, maps = static_cast<int>(layer.group_maps);
  const int in_tile = maps - static_cast<int>(map_first);                /* or more */
  const int outputs = static_cast<int>(layer.group_outputs) - quad * 16; /* from this thread's first one on */
  const uint64_t seed = seed_read(layer);

  /* A mean and a slope for each map, then the offsets, from which the sums start. */
  float *const affine = reinterpret_cast<float *>(memory), *const offsets = affine + 2 * S::maps;
  const char *const weight = memory + (AFFINE ? affine_bytes<S> : 0);
  if (AFFINE)
    for (int i = thread_index(); i < S::maps; i += H::threads) {
      const int64_t map = group * layer.group_maps + map_first + i;
      affine[2 * i] = i < in_tile ? static_cast<const float *>(layer.mean)[map] : 0.0f;
      affine[2 * i + 1] = i < in_tile ? static_cast<const float *>(layer.slope)[map] : 0.0f;
      offsets[i] = i < in_tile ? static_cast<const float *>(layer.offset)[map] : 0.0f;
    }

  Place place[2];
  bool there[2];
  Operand<D, G> g, next;
  place_pixels(layer, tile, place, there);
  g.move_to(layer, grid, group, place, tile < last);
#pragma unroll
  for (int product = 0; product < PRODUCTS; product++) g.load(grid, 0, product);
  copy_wait<0>();
  shared_to_products();
  __syncthreads(); /* all threads' parts of V, and of what stands before it, are there */

  /* blockIdx.y is 0: with it the assembler keeps the constant in a register, not the four selectors of its bytes. */
  const uint32_t lattice = LATTICE + blockIdx.y;

  /* A of as many products as there are registers for. */
  constexpr int OPERANDS = SIZE == 4 && G == DEPTH_FASTEST && S::maps == Narrow::maps ? 2 : PRODUCTS;
  uint32_t operands[OPERANDS][4];
  float d[S::maps / 2];
#pragma unroll 1
  for (; tile < last; tile += H::warpgroups) {
    place_pixels(layer, tile + H::warpgroups, place, there);
    next.move_to(layer, grid, group, place, tile + H::warpgroups < last);
    place_pixels(layer, tile, place, there);
    uint32_t row[2], column[2];
    const char *from[2];
    char *to[2];
    const int own = keep(first); /* what could be made of it before all tiles would wait in registers */
    const int64_t channels = group * layer.group_channels;
#pragma unroll
    for (int p = 0; p < 2; p++) {
      const Pixel pixel = pixel_make(layer, place[p]);
      row[p] = pixel.row, column[p] = pixel.column;
      from[p] = layer.input.data + place_in(layer.input, place[p]) * SIZE +
                (channels + ((own < maps ? own : 0) >> shift)) * grid.input;
      to[p] = layer.grad_input.data + place_in(layer.grad_input, place[p]) * SIZE +
              (channels + (own >> shift)) * grid.grad_input;
    }
    InputsOf<D, WAY == PLAIN_PIXELS ? READ_PIXELS : READ_CHANNELS, MASKS> x;
    x.load(0, from, grid.input);
    x.load(1, from, grid.input);
#pragma unroll
    for (int i = 0; i < S::maps / 2; i += 4) {
      words2 start = {{0, 0}};
      if constexpr (AFFINE)
        start = load_shared(reinterpret_cast<const words2 *>(offsets + i / 32 * 64 + quad * 16 + i / 4 % 8 * 2));
      d[i] = d[i + 2] = float_of(start.w[0]);
      d[i + 1] = d[i + 3] = float_of(start.w[1]);
    }
    products_start(d);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
#pragma unroll
      for (int part = 0; part < PARTS<D>; part++) {
        const char *const v = weight + step * H::step_bytes + part * H::part_bytes;
        const bool ends = part + 1 == PARTS<D>;
        if (ends) g.follow_if(step + 1 == steps, next); /* what is loaded in the last part is the next tile's */
#pragma unroll
        for (int product = 0; product < PRODUCTS; product++) {
          uint32_t(&a)[4] = operands[product % OPERANDS];
          products_wait<OPERANDS - 1>(); /* the one that read it is done */
          g.make(product, outputs - step * STEP - part * Operand<D, G>::OUTPUTS, a);
          products_operand(a);
          products_add(D{}, d, a, matrix_descriptor(v + product * 2 * S::maps * 16, S::maps * 16, 128));
          products_commit();
          g.load(grid, ends ? 0 : part + 1, product);
        }
      }
    }
    /* What could be made of these before the products would wait in registers until here. */
    const int here = keep(first);
    uint32_t words[2][4],
        number = static_cast<uint32_t>(group * layer.group_maps / 16) + static_cast<uint32_t>(here / 16);
    const auto generate = [&] {
#pragma unroll
      for (int p = 0; p < 2; p++) words[p][0] = column[p], words[p][1] = row[p], words[p][2] = number, words[p][3] = 0;
      philox_both(words, seed);
      number += 64 / 16;
    };
#pragma unroll
    for (int p = 0; p < 2; p++) row[p] = keep(row[p]), column[p] = keep(column[p]);
    generate(); /* while the last products run */
    products_finish(d);
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      if (block * 64 >= in_tile) break;
      if (block > 0) generate();
      const int k = here + block * 64;
      if (block + 1 < BLOCKS) {
        const int64_t step = k + 64 < maps ? (64 >> shift) * grid.input : 0;
#pragma unroll
        for (int p = 0; p < 2; p++) from[p] += step;
      }
      float sum[2][STORED];
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int two = half * 8; two < half * 8 + 8; two += 2) {
          float mean[2] = {}, slope[2] = {};
          if constexpr (AFFINE) {
            const words4 w = load_shared(reinterpret_cast<const words4 *>(affine + (block * 64 + quad * 16 + two) * 2));
            mean[0] = float_of(w.w[0]), slope[0] = float_of(w.w[1]);
            mean[1] = float_of(w.w[2]), slope[1] = float_of(w.w[3]);
          }
#pragma unroll
          for (int p = 0; p < 2; p++)
#pragma unroll
            for (int e = two; e < two + 2; e++) {
              const float u = x.value(p, e) + layer.level_float * lattice_in(words[p][e / 4], e % 4, lattice);
              float da = d[block * 32 + e / 2 * 4 + p * 2 + e % 2];
              if constexpr (AFFINE) /* where u is not above 0, da means nothing */
                da = fma_(slope[e % 2], widen(round_to(D{}, u - mean[e % 2])), da);
              const float t = u <= 0 ? 0.0f : da;
              float &s = sum[p][e / MASKS % STORED];
              s = e % MASKS == 0 ? t : s + t;
            }
        }
        if (block + 1 < BLOCKS) x.load(half, from, grid.input);
        if (half == 0 && STORED == COUNT) continue;
        bool wanted = k < maps;
        if constexpr (MASKS == 16) {
#pragma unroll
          for (int more = 1; more < 4; more *= 2)
            if (shift > 3 + more) {
#pragma unroll
              for (int p = 0; p < 2; p++) sum[p][0] += __shfl_xor_sync(0xffffffffu, sum[p][0], more);
              wanted = wanted && !(quad & more);
            }
        }
        const bool both[2] = {wanted && there[0], wanted && there[1]};
        store_channels<D, STORED>(layer, grid, to, both, sum);
        const int64_t step = STORED < COUNT ? (half ? 64 - STORED : STORED) : 64 >> shift;
#pragma unroll
        for (int p = 0; p < 2; p++) to[p] += step * grid.grad_input;
      }
    }
  }
}

template <class D, class S, Fastest G, Way WAY, bool AFFINE>
__global__ void __launch_bounds__((Shape<D, S, G, AFFINE>::threads), 1)
    input_gradient_wgmma_kernel(const __grid_constant__ Layer layer, const __grid_constant__ Grid grid) {
  using H = Shape<D, S, G, AFFINE>;
  PNN_SHARED_MEMORY(memory);
  const int thread = thread_index();
  int64_t row, map_tile;
  const int piece = static_cast<int>(divide<true>(grid.by_rows, blockIdx.x, &row));
  const int64_t group = divide<true>(grid.by_map_tiles, row, &map_tile), map_first = map_tile * S::maps;
  const int bytes = static_cast<int>((layer.group_outputs + STEP - 1) / STEP) * H::step_bytes;
  const char *const weight = layer.weight + row * bytes;
#pragma unroll 4
  for (int i = thread * 16; i < bytes; i += H::threads * 16)
    copy_async16(memory + (AFFINE ? affine_bytes<S> : 0) + i, weight + i, 16);
  copy_commit();
  const int begin = piece * grid.tiles + (piece < grid.more ? piece : grid.more);
  const int last = begin + grid.tiles + (piece < grid.more), tile = begin + thread / 128;
  if (layer.masks_shift == 0)
    run_block<D, S, G, WAY, AFFINE, 1>(layer, grid, group, map_first, tile, last, memory);
  else if (layer.masks_shift == 1)
    run_block<D, S, G, WAY, AFFINE, 2>(layer, grid, group, map_first, tile, last, memory);
  else if (layer.masks_shift == 2)
    run_block<D, S, G, WAY, AFFINE, 4>(layer, grid, group, map_first, tile, last, memory);
  else if (layer.masks_shift == 3)
    run_block<D, S, G, WAY, AFFINE, 8>(layer, grid, group, map_first, tile, last, memory);
  else
    run_block<D, S, G, WAY, AFFINE, 16>(layer, grid, group, map_first, tile, last, memory);
}

/* ---- the host's side ---- */

/* The multiprocessors of the current device. */
int64_t multiprocessors_here() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0)
    return count;
#endif
  return wanted_blocks();
}

/* Pieces to cut the pixels into, `rows` blocks each: those that leave the fewest multiprocessors idle in the last round
 * of blocks, in the first one if that is good enough. Results do not depend on it. */
int64_t pieces_of(int64_t rows, int64_t tiles) {
  const int64_t processors = multiprocessors_here();
  int64_t best = 1, best_blocks = 0, best_rounds = 1;
  for (int64_t rounds = ceil_div(rows, processors), end = rounds + 8; rounds < end; rounds++) {
    const int64_t pieces = rounds * processors / rows, blocks = pieces * rows;
    if (blocks * best_rounds > best_blocks * rounds) best = pieces, best_blocks = blocks, best_rounds = rounds;
    if (best_blocks * 10 >= best_rounds * processors * 9) break;
  }
  return best < tiles ? best : tiles;
}

template <class D>
int64_t weight_bytes(const Layer &layer, int64_t maps) {
  return ceil_div(layer.group_outputs, STEP) * STEP * maps * static_cast<int64_t>(sizeof(D));
}

/* The widest tile that the maps fill by more than half, that gives a large GPU enough blocks, and whose V has room.
 * Results do not depend on it. */
template <class D, class S>
bool is_chosen(const Layer &layer) {
  const Fastest g = layer.grad_output_staging == STAGE_PIXELS ? ROWS_FASTEST : DEPTH_FASTEST;
  const int64_t warpgroups = warpgroups_of<D, S>(layer.slope != nullptr, g);
  return warpgroups > 0 && layer.group_maps > S::maps / 2 && weight_bytes<D>(layer, S::maps) <= MOST_BYTES &&
         ceil_div(layer.group_maps, S::maps) * ceil_div(layer.columns, warpgroups * int64_t{PIXELS}) * layer.groups >=
             wanted_blocks();
}

template <class D, class S, Fastest G, Way WAY, bool AFFINE>
Status launch(const Layer &layer, Stream stream) {
  constexpr int SIZE = static_cast<int>(sizeof(D));
  const int64_t map_tiles = ceil_div(layer.group_maps, S::maps), rows = map_tiles * layer.groups;
  const int64_t tiles = ceil_div(layer.columns, PIXELS), pieces = pieces_of(rows, tiles);
  const Grid grid = {divider_make(rows),
                     divider_make(map_tiles),
                     static_cast<int>(tiles / pieces),
                     static_cast<int>(tiles % pieces),
                     layer.input.channel * SIZE,
                     layer.grad_output.channel * SIZE,
                     layer.grad_input.channel * SIZE};
  const auto kernel = input_gradient_wgmma_kernel<D, S, G, WAY, AFFINE>;
  const size_t shared = static_cast<size_t>(weight_bytes<D>(layer, S::maps) + (AFFINE ? affine_bytes<S> : 0));
  Status status;
  PNN_LAUNCH(status, kernel, rows * pieces, (Shape<D, S, G, AFFINE>::threads), shared, stream, layer, grid);
  return status;
}

template <class D, class S, Fastest G, Way WAY>
Status choose_kind(const Layer &layer, Stream stream) {
  if constexpr (warpgroups_of<D, S>(true, G) > 0)
    if (layer.slope) return launch<D, S, G, WAY, true>(layer, stream);
  return launch<D, S, G, WAY, false>(layer, stream);
}

template <class D, class S, Fastest G>
Status choose_way(const Layer &layer, Stream stream) {
  return way_of<D>(layer) == PLAIN_PIXELS ? choose_kind<D, S, G, PLAIN_PIXELS>(layer, stream)
                                          : choose_kind<D, S, G, PLAIN_CHANNELS>(layer, stream);
}

template <class D, class S>
Status run(const Layer &layer, Matrix weight, const double *scale, void *copy, Stream stream) {
  const WeightOrder order = {layer.groups,
                             layer.group_maps,
                             layer.group_outputs,
                             layer.group_outputs * weight.step[0],
                             weight.step[1],
                             weight.step[0],
                             scale};
  const Status status = run_wgmma_weight<D, S::maps, 64, true>(order, weight.data, copy, stream);
  if (status != STATUS_OK) return status;
  Layer copied = layer;
  copied.weight = static_cast<const char *>(copy);
  return layer.grad_output_staging == STAGE_PIXELS ? choose_way<D, S, ROWS_FASTEST>(copied, stream)
                                                   : choose_way<D, S, DEPTH_FASTEST>(copied, stream);
}

template <class D>
Status choose(const Layer &layer, Matrix weight, const double *scale, void *copy, Stream stream) {
  if constexpr (warpgroups_of<D, Wide>(false, ROWS_FASTEST) > 0)
    if (is_chosen<D, Wide>(layer)) return run<D, Wide>(layer, weight, scale, copy, stream);
  if (is_chosen<D, Middle>(layer)) return run<D, Middle>(layer, weight, scale, copy, stream);
  return run<D, Narrow>(layer, weight, scale, copy, stream);
}

template <class D, class S, Fastest G>
void list(Visit visit, const std::string &name) {
  for (const char *way : {" pixels", " channels"}) {
    visit((name + way).c_str(), Shape<D, S, G, false>::threads, MOST_BYTES);
    if constexpr (warpgroups_of<D, S>(true, G) > 0)
      visit((name + way + " affine").c_str(), Shape<D, S, G, true>::threads, MOST_BYTES + affine_bytes<S>);
  }
}
template <class D, class S>
void list(Visit visit, const std::string &name) {
  list<D, S, DEPTH_FASTEST>(visit, name + " depth");
  list<D, S, ROWS_FASTEST>(visit, name + " rows");
}

template <class D>
bool fits(const Layer &layer) {
  const bool whole = layer.grad_output_staging == STAGE_PIXELS ||
                     (layer.grad_output_staging == STAGE_CHANNELS && layer.group_outputs % Depth<D>::vector == 0);
  return way_of<D>(layer) != ANY_WAY && whole && layer.masks <= 64 && layer.group_maps > Narrow::maps / 2 &&
         weight_bytes<D>(layer, Narrow::maps) <= MOST_BYTES && layer.columns > 0 && has_wgmma();
}

}  // namespace

bool input_gradient_wgmma_fits(const Layer &layer, int product) {
  if (product == PNN_BFLOAT16 || product == PNN_FLOAT16) return fits<bfloat16>(layer);
  return product == PRODUCT_TF32 && fits<tf32>(layer);
}

void list_input_gradient_wgmma(Visit visit) {
  const std::string name = "input_gradient_wgmma ";
  list<bfloat16, Wide>(visit, name + "bfloat16 Wide");
  list<bfloat16, Middle>(visit, name + "bfloat16 Middle");
  list<bfloat16, Narrow>(visit, name + "bfloat16 Narrow");
  list<float16, Wide>(visit, name + "float16 Wide");
  list<float16, Middle>(visit, name + "float16 Middle");
  list<float16, Narrow>(visit, name + "float16 Narrow");
  list<tf32, Middle>(visit, name + "tf32 Middle");
  list<tf32, Narrow>(visit, name + "tf32 Narrow");
}

Status run_input_gradient_wgmma(const Layer &layer, int product, Matrix weight, const double *scale, void *copy,
                                Stream stream) {
  if (product == PNN_BFLOAT16) return choose<bfloat16>(layer, weight, scale, copy, stream);
  if (product == PNN_FLOAT16) return choose<float16>(layer, weight, scale, copy, stream);
  return choose<tf32>(layer, weight, scale, copy, stream);
}

}  // namespace pnn_cuda
