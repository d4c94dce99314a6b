/*
 * weight_gradient_wgmma.cu - the weight gradient of plain 16-bit layers (response.h) by Hopper's asynchronous products,
 * for sm_90a alone.
 *
 * As in weight_gradient.cu, G[t,k] = sum over q of g[t,q] * response[k,q] and h[t] = sum over q of g[t,q], of a block's
 * piece of the pixels: D [output][map] += A [output][pixel] * B [pixel][map], 64 outputs to a product. A is g as it is
 * stored, in the registers that the tensor cores read; B is made by all threads and goes through shared memory.
 * Products run while the same threads make the operand of the next step:
 *
 *     g --cp.async, a step ahead--> shared memory ----------------------------> registers: A ----------> wgmma
 *     x --cp.async, a step ahead--> shared memory --masks, relu, rounding--> shared memory: B, two steps' --^
 *
 * Neither is loaded into registers ahead of its use: a warp has six scoreboards, and what shares one with such a load
 * waits for it.
 *
 * With normalisation, CENTRED, the response is the one minus its mean.
 *
 * A step takes 64 pixels, in two halves. A thread of a product owns the depths {2t, 2t+1, 2t+8, 2t+9} (t = lane % 4) of
 * rows i and i + 8 (i = lane / 4). Which pixels and outputs stand there is free, as long as B has the same pixels:
 *
 *     depths   thread t's, of a half's two products together, are the pixels 8 t to 8 t + 7: 16 bytes of g where the
 *              pixels are contiguous
 *     rows     thread i's, of a warpgroup's one or two blocks of 64, are neighbouring outputs: one load of g where the
 *              channels are contiguous
 *
 * The first step is the only one that may be short, and what is no pixel in it becomes zero in both operands (no
 * infinity may meet the other one's zeros): it takes a piece's last pixels, the others the rest, in order. So neither
 * the tile nor the batch's address changes a sum.
 */
#include <string>

#include "kernels.h"
#include "response.h"
#include "tile.h"
#include "wgmma.h"

namespace pnn_cuda {
namespace {

constexpr int HALF = STEP / 2; /* pixels */
constexpr int BUFFERS = 2;     /* of B: of this step, and of the last one, whose products may still run */
constexpr int STAGES = 2;      /* of x and g: of this step and of the next one */
constexpr int TABLES = 3;      /* of this step and of the next two */

/* Tiles, as many outputs as registers hold sums of: operand B is made once for each of them. */
struct Wide {
  [[maybe_unused]] static constexpr int warpgroups = 2, row_blocks = 2, maps = 128, blocks = 1;
};
struct Middle {
  [[maybe_unused]] static constexpr int warpgroups = 1, row_blocks = 2, maps = 128, blocks = 2;
};
struct Narrow {
  [[maybe_unused]] static constexpr int warpgroups = 1, row_blocks = 1, maps = 64, blocks = 4;
};

/* Where a step's pixels stand, in bytes; pixels that are none as the piece's first one. Pairs of pixels in the order of
 * `pair_of`. */
struct Table {
  uint32_t place[STEP][2];    /* row, column */
  int64_t input[STEP];        /* in order; where the pixels are contiguous, of runs of eight */
  int64_t gradient[STEP / 8]; /* of such runs */
};

template <class S>
struct Shape {
  static constexpr int threads = 128 * S::warpgroups, outputs = 64 * S::row_blocks * S::warpgroups;
  static constexpr int ITEMS = HALF * (S::maps / SIXTEEN) / threads; /* pairs of pixels that a thread makes in a step */
  static_assert(ITEMS == 1 || ITEMS == 2, "one for each half, or one");
  /* B: core matrices of eight pixels by eight maps, 128 bytes, the next maps' and then the next pixels' behind them;
   * 16 bytes between them, so that neither eight pairs of pixels nor four sixteens of maps meet in a bank. */
  static constexpr int column_step = 128 + 16, depth_step = S::maps / 8 * column_step + 16;
  static constexpr int buffer_bytes = STEP / 8 * depth_step;
  /* Of a step: the most x that Staged takes, and g. */
  static constexpr int input_bytes = S::maps * STEP * 2 + 512, gradient_bytes = STEP * outputs * 2;
  static constexpr int tables_at = BUFFERS * buffer_bytes,
                       inputs_at = tables_at + TABLES * static_cast<int>(sizeof(Table)),
                       gradients_at = inputs_at + STAGES * input_bytes,
                       totals_at = gradients_at + STAGES * gradient_bytes,
                       means_at = totals_at + threads * 2 * S::row_blocks * 4, bytes = means_at + S::maps * 4;
};

/* Of the pair of pixels with number `quad` * 4 + `word` in a half (pixels 8 quad + 2 word and the next one). */
PNN_DEVICE int pair_of(int half, int quad, int word) { return (half * 4 + word) * 4 + quad; }

/* A step's x of a tile's channels in shared memory: rows of a channel's 64 pixels, or a row for each pixel, with room
 * behind each sixteen maps' or each two pixels' rows, so that what threads read together meets in no bank. Of more than
 * sixteen masks to a channel there are fewer channels than this. */
template <class S, bool PIXELS, int MASKS>
struct Staged {
  static constexpr int CHANNELS = S::maps / MASKS, COUNT = SIXTEEN / MASKS;
  static constexpr int RUNS_OF = PIXELS ? STEP / 8 : CHANNELS < 8 ? 1 : CHANNELS / 8; /* of 16 bytes, in a row */
  static constexpr int ROWS = PIXELS ? CHANNELS : STEP;
  static constexpr int TOGETHER = PIXELS ? COUNT : 2, ROOM = PIXELS || MASKS == 2 ? 64 : MASKS == 4 ? 32 : 16;
  static PNN_DEVICE int at(int row) { return row * RUNS_OF * 16 + row / TOGETHER * ROOM; }
  static_assert(ROWS * RUNS_OF * 16 + ROWS / TOGETHER * ROOM <= Shape<S>::input_bytes);
};

/* g in shared memory, and as the products read it: for this thread's rows, eight of its pixels in each half of a step.
 */
template <class D, class S, Fastest G>
struct Gradient {
  using H = Shape<S>;
  static constexpr int ROWS = 2 * S::row_blocks, WORDS = 4 * ROWS;
  /* Where the pixels are contiguous, a thread copies what it reads, so that one stage is enough: when it has read a
   * step's it copies the next one's. Where the channels are, the tile lies there as [pixel][output], its 16 bytes in
   * such an order that the pixels of four threads meet in no bank. */
  static constexpr int AHEAD = G == DEPTH_FASTEST ? 1 : 2; /* steps */
  static constexpr int RUNS_OF = H::outputs / 8;           /* of 16 bytes, to a pixel */
  static_assert(RUNS_OF % 8 == 0, "place_of moves runs among eight");
  static PNN_DEVICE int place_of(int run, int quad) { return (run ^ quad << 1) * 16; }

  const char *from[G == DEPTH_FASTEST ? ROWS : 1]; /* of this thread's rows, or of the tile */
  char *memory;
  int own, outputs; /* where this thread's numbers begin in a stage; of the tile */

  /* The block's `outputs` begin at channel `channel`, this thread's rows at output `row` of them. */
  PNN_DEVICE Gradient(const Layer &layer, int64_t channel, int row, int outputs_, char *memory_)
      : memory(memory_ + H::gradients_at), outputs(outputs_) {
    const View &view = layer.grad_output;
    if constexpr (G == DEPTH_FASTEST) {
      own = thread_index() * 16;
#pragma unroll
      for (int i = 0; i < ROWS; i++) /* beyond the outputs as the first one, whose sums nobody reads */
        from[i] = view.data + (channel + (row + i < outputs ? row + i : 0)) * view.channel * 2;
    } else {
      const int quad = thread_index() % 4;
      own = quad * 8 * RUNS_OF * 16 + place_of(row / 8, quad) + row % 8 * 2;
      from[0] = view.data + channel * 2;
    }
  }
  /* Has a step's g copied: of the first `count` pixels, zeros for the others. at(j) is where pixel j's is in memory. */
  template <class At>
  PNN_DEVICE void copy(int step, int count, const At &at) const {
    if constexpr (G == DEPTH_FASTEST) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int j = h * HALF + thread_index() % 4 * 8;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
          copy_async16_or_zero(memory + own + (h * ROWS + i) * H::threads * 16, from[i] + at(j), j < count);
      }
    } else {
#pragma unroll
      for (int i = 0; i < STEP * RUNS_OF; i += H::threads) {
        const int j = (i + thread_index()) / RUNS_OF, run = thread_index() % RUNS_OF;
        copy_async16_or_zero(memory + step % STAGES * H::gradient_bytes + j * RUNS_OF * 16 + place_of(run, j / 8 % 4),
                             from[0] + at(j) + run * 16, j < count && run * 8 < outputs);
      }
    }
  }
  /* A half's, which has been copied. */
  PNN_DEVICE void load(int step, int h, uint32_t (&raw)[WORDS]) const {
    if constexpr (G == DEPTH_FASTEST) {
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const words4 v = load_shared(reinterpret_cast<const words4 *>(memory + own + (h * ROWS + i) * H::threads * 16));
#pragma unroll
        for (int w = 0; w < 4; w++) raw[i * 4 + w] = v.w[w];
      }
    } else {
      const char *const at = memory + step % STAGES * H::gradient_bytes + own + h * HALF * RUNS_OF * 16;
#pragma unroll
      for (int p = 0; p < 8; p++) {
        if constexpr (S::row_blocks == 2) {
          const words2 v = load_shared(reinterpret_cast<const words2 *>(at + p * RUNS_OF * 16));
          raw[p * 2] = v.w[0], raw[p * 2 + 1] = v.w[1];
        } else {
          raw[p] = load_shared(reinterpret_cast<const uint32_t *>(at + p * RUNS_OF * 16));
        }
      }
    }
  }
  /* `all` is all ones, which the compiler does not know: it would move what is loaded to where the products want it at
   * the load, and wait for it there. */
  PNN_DEVICE void operand(const uint32_t (&raw)[WORDS], uint32_t all, uint32_t (&a)[2][S::row_blocks][4]) const {
#pragma unroll
    for (int b = 0; b < S::row_blocks; b++)
#pragma unroll
      for (int w = 0; w < 4; w++)
#pragma unroll
        for (int r = 0; r < 2; r++)
          a[w / 2][b][w % 2 * 2 + r] = G == DEPTH_FASTEST
                                           ? raw[(b * 2 + r) * 4 + w] & all
                                           : permute(raw[2 * w * S::row_blocks + b],
                                                     raw[(2 * w + 1) * S::row_blocks + b], r ? 0x7632u : 0x5410u);
  }
  /* Adds this thread's pixels to the sums of those of its rows that are in the set `summed`, in order. */
  PNN_DEVICE void add_to(const uint32_t (&raw)[WORDS], uint32_t summed, float (&sums)[ROWS]) const {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      if (!(summed >> i & 1)) continue;
#pragma unroll
      for (int p = 0; p < 8; p++)
        sums[i] += G == DEPTH_FASTEST ? half_of(D{}, raw[i * 4 + p / 2], p % 2)
                                      : half_of(D{}, raw[p * S::row_blocks + i / 2], i % 2);
    }
  }
};

/* What a block takes. */
struct Part {
  int64_t t0, k0, group, split; /* the first output and map, of the group */
  int64_t q_begin;
  int pixels, outputs, maps; /* of its piece, of the tile */
  int64_t gradient_step;     /* Gradient's, where the channels are contiguous */
  uint32_t summed;           /* set of each thread's rows whose h it adds up */
};

/* This thread's first sum of h; its others lie `threads` apart. */
template <class S>
PNN_DEVICE float *totals_in(char *memory) {
  using H = Shape<S>;
  return reinterpret_cast<float *>(memory + H::totals_at) + thread_index();
}

/* d = A * B over the block's pixels; h's sums are left in shared memory. */
template <class D, class S, Fastest G, bool PIXELS, bool CENTRED, int MASKS>
PNN_DEVICE void add_products(const Layer &layer, const Part &part, char *memory,
                             float (&d)[S::row_blocks][S::maps / 2]) {
  using H = Shape<S>;
  constexpr int R = S::row_blocks;
  Table *const tables = reinterpret_cast<Table *>(memory + H::tables_at);
  float *const totals = totals_in<S>(memory);
  char *const inputs = memory + H::inputs_at;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int first = (part.pixels - 1) % STEP + 1; /* pixels of the first step */
  const int steps = (part.pixels + STEP - 1) / STEP;

  /* This thread's pair of pixels and sixteen maps: neighbouring lanes have x's neighbouring words, and stores that meet
   * no bank twice. */
  int half, pair_quad, pair_word, sixteen;
  if (PIXELS) {
    pair_quad = lane % 4, pair_word = lane / 4 % 4;
    half = H::ITEMS == 1 ? lane / 16 : 0;
    sixteen = H::ITEMS == 1 ? warp : warp * 2 + lane / 16;
  } else {
    constexpr int FOURS = S::maps / SIXTEEN / 4; /* of sixteens */
    pair_word = lane / 4 % 4;
    pair_quad = lane / 16 + warp % 2 * 2;
    sixteen = lane % 4 + warp / 2 % FOURS * 4;
    half = H::ITEMS == 1 ? warp / 2 / FOURS : 0;
  }
  const int pair = pair_of(half, pair_quad, pair_word) * 2;
  const int to = (half * 4 + pair_word) * H::depth_step + sixteen * 2 * H::column_step + pair_quad * 32;
  const int k = static_cast<int>(part.k0) + (sixteen * SIXTEEN < part.maps ? sixteen * SIXTEEN : 0);
  const uint32_t block = static_cast<uint32_t>((part.group * layer.group_maps + k) / SIXTEEN);
  const int64_t channel = (PIXELS ? layer.input.channel : 1) * 2;
  const int tile_channel = static_cast<int>(part.k0) >> layer.masks_shift; /* the first one of the tile */
  const int channels = part.maps > 1 << layer.masks_shift ? part.maps >> layer.masks_shift : 1;
  /* Where x's channels are contiguous, from a run of 16 bytes on. */
  const int skipped = PIXELS ? 0 : tile_channel % 8;
  const char *const input = layer.input.data + (part.group * layer.group_channels + tile_channel - skipped) * channel;
  using X = Staged<S, PIXELS, MASKS>;
  const int own_channel = (k >> layer.masks_shift) - tile_channel; /* in the tile */
  const int pixel = half * HALF + pair_quad * 8 + pair_word * 2;
  const char *const own_input =
      inputs + (PIXELS ? X::at(own_channel) + pixel * 2 : X::at(pixel) + (own_channel + skipped) * 2);
  const PairKeys<R == 1 ? 2 : 5> keys(seed_read(layer)); /* as many as there are registers for */
  const float level = layer.level_float;

  /* Of the piece's pixels, which is pixel j of a step; the first one where there is none. */
  const auto first_pixel = [&](int j) { return j < first ? part.pixels - first + j : 0; };
  const auto later_pixel = [&](int step, int j) { return step < steps ? (step - 1) * STEP + j : 0; };
  const auto look_up = [&](int step, int j, int in_piece) {
    Table &table = tables[step % TABLES];
    const Place place = place_make<true>(layer, part.q_begin + in_piece);
    const Pixel pixel = pixel_make(layer, place);
    const int at = pair_of(j / HALF, j / 8 % 4, j / 2 % 4) * 2 + j % 2;
    table.place[at][0] = pixel.row, table.place[at][1] = pixel.column;
    if (!PIXELS || j % 8 == 0) table.input[PIXELS ? j / 8 : j] = place_in(layer.input, place) * 2;
    if (G == DEPTH_FASTEST && j % 8 == 0) table.gradient[j / 8] = place_in(layer.grad_output, place) * 2;
  };

  const int row = (thread / 128 * 64 + warp % 4 * 16) * R + lane / 4 * 2 * R;
  const Gradient<D, S, G> gradient(layer, part.group * layer.group_outputs + part.t0, row, part.outputs, memory);
  /* Has a step's g copied to shared memory. */
  const auto copy_first_gradient = [&] {
    gradient.copy(0, first, [&](int j) {
      return G == DEPTH_FASTEST ? tables[0].gradient[j / 8] : (part.q_begin + first_pixel(j)) * part.gradient_step;
    });
  };
  const auto copy_gradient = [&](int step) {
    gradient.copy(step, STEP, [&](int j) {
      return G == DEPTH_FASTEST ? tables[step % TABLES].gradient[j / 8]
                                : (part.q_begin + later_pixel(step, j)) * part.gradient_step;
    });
  };
  /* Has a step's x copied to shared memory. */
  const auto copy_input = [&](int step) {
    const Table &table = tables[step % TABLES];
    char *const to_ = inputs + step % STAGES * H::input_bytes;
    constexpr int ALL = X::ROWS * X::RUNS_OF;
    const int first_row = thread / X::RUNS_OF;
#pragma unroll
    for (int i = 0; i < ALL; i += H::threads) {
      const int row = (i + thread) / X::RUNS_OF, run = (i + thread) % X::RUNS_OF;
      /* The second form is the first one's value: the assembler runs out of registers where it has the other one. */
      const int at = PIXELS ? X::at(row) : X::at(first_row) + X::at(i / X::RUNS_OF);
      if ((ALL % H::threads == 0 || i + thread < ALL) && (PIXELS ? row : run * 8) < channels)
        copy_async16(to_ + at + run * 16,
                     input + (PIXELS ? row * channel + table.input[run] : run * 16 + table.input[row]), 16);
    }
  };

  float *const means = reinterpret_cast<float *>(memory + H::means_at);
  if (CENTRED)
    for (int i = thread; i < S::maps; i += H::threads)
      means[i] =
          i < part.maps ? static_cast<const float *>(layer.mean)[part.group * layer.group_maps + part.k0 + i] : 0.0f;
  for (int i = thread; i < 2 * STEP; i += H::threads)
    look_up(i / STEP, i % STEP, i < STEP ? first_pixel(i) : later_pixel(1, i - STEP));
  if (part.summed) {
#pragma unroll
    for (int i = 0; i < 2 * R; i++) totals[i * H::threads] = 0;
  }
  __syncthreads();
  copy_input(0);
  copy_first_gradient();
  copy_commit();
  if (steps > 1) {
    copy_input(1);
    if (gradient.AHEAD == 2) copy_gradient(1);
  }
  copy_commit();
  copy_wait<1>();
  __syncthreads();
  uint32_t a[2][2][R][4]; /* of both halves */
  const uint32_t all = ~static_cast<uint32_t>(layer.split_columns >> 32);
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const Table &table = tables[step % TABLES];
    char *const buffer = memory + step % BUFFERS * H::buffer_bytes;
    Inputs<D, PIXELS, MASKS> x;
#pragma unroll
    for (int own = 0; own < H::ITEMS; own++) { /* of the thread's pairs of pixels */
      const char *const at = own_input + step % STAGES * H::input_bytes + (PIXELS ? own * HALF * 2 : X::at(own * HALF));
      const char *const from[2] = {at, PIXELS ? nullptr : at + X::at(1)};
      const words4 places = load_shared(reinterpret_cast<const words4 *>(table.place[pair + own * HALF]));
      uint32_t words[2][4];
#pragma unroll
      for (int p = 0; p < 2; p++)
        words[p][0] = places.w[p * 2 + 1], words[p][1] = places.w[p * 2], words[p][2] = block, words[p][3] = 0;
      keys.philox(words);
#pragma unroll
      for (int run = 0; run < 2; run++) {
        if (MASKS == 1 || run == 0) x.template load<true>(run, from, STEP * 2);
        if (MASKS > 1 && run == 0) x.template load<true>(1, from, STEP * 2);
        float center[RUN] = {};
        if constexpr (CENTRED) {
#pragma unroll
          for (int i = 0; i < RUN; i += 4) {
            const words4 four =
                load_shared(reinterpret_cast<const words4 *>(means + sixteen * SIXTEEN + run * RUN + i));
#pragma unroll
            for (int e = 0; e < 4; e++) center[i + e] = float_of(four.w[e]);
          }
        }
#pragma unroll
        for (int p = 0; p < 2; p++) {
          words4 v;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float u[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int map = run * RUN + i * 2 + e;
              u[e] = x.value(p, map) + level * lattice_in(words[p][map / 4], map % 4);
              if (CENTRED) u[e] = relu_any_zero(u[e]) - center[i * 2 + e];
            }
            v.w[i] = CENTRED ? round_pair(D{}, u[0], u[1]) : round_pair_relu(D{}, u[0], u[1]);
          }
          store_shared_whole(
              reinterpret_cast<words4 *>(buffer + to + own * 4 * H::depth_step + run * H::column_step + p * 16), v);
        }
      }
    }
    /* No branch may stand between an operand and its product. */
    if (step == 0 && first < STEP) { /* what is no pixel becomes zero */
#pragma unroll
      for (int i = 0; i < H::ITEMS * 2; i++)
        if (pixel + i / 2 * HALF + i % 2 >= first) {
          char *const at = buffer + to + i / 2 * 4 * H::depth_step + i % 2 * 16;
          store_shared_whole(reinterpret_cast<words4 *>(at), words4{{0, 0, 0, 0}});
          store_shared_whole(reinterpret_cast<words4 *>(at + H::column_step), words4{{0, 0, 0, 0}});
        }
    }
    if (thread / STEP == step % (H::threads / STEP)) {
      const int j = thread % STEP;
      look_up(step + 2, j, later_pixel(step + 2, j));
    }
    copy_wait<0>(); /* what is copied in a step is there in the next one */
    if (part.summed) {
      float sums[2 * R];
#pragma unroll
      for (int i = 0; i < 2 * R; i++) sums[i] = totals[i * H::threads];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint32_t raw[Gradient<D, S, G>::WORDS];
        gradient.load(step, h, raw);
        gradient.add_to(raw, part.summed, sums);
      }
#pragma unroll
      for (int i = 0; i < 2 * R; i++) totals[i * H::threads] = sums[i];
    }
    products_wait<0>(); /* the last step's, whose operands may be written again */
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint32_t raw[Gradient<D, S, G>::WORDS];
      gradient.load(step, h, raw);
      gradient.operand(raw, all, a[h]);
    }
    shared_to_products();
    __syncthreads(); /* all of this step's B and of the next one's x and g; the last step's may be written again */
#pragma unroll
    for (int i = 0; i < PRODUCTS; i++) {
      const uint64_t descriptor =
          matrix_descriptor_transposed(buffer + i * 2 * H::depth_step, H::depth_step, H::column_step);
#pragma unroll
      for (int b = 0; b < R; b++) products_operand(a[i / 2][i % 2][b]);
#pragma unroll
      for (int b = 0; b < R; b++) products_add_transposed(D{}, d[b], a[i / 2][i % 2][b], descriptor);
    }
    products_commit();
    if (step + 2 < steps) copy_input(step + 2);
    if (step + gradient.AHEAD < steps) copy_gradient(step + gradient.AHEAD);
    copy_commit();
  }
#pragma unroll
  for (int b = 0; b < R; b++) products_finish(d[b]);
}

struct Grid {
  int64_t first_tile, gradient_step;
  Divider by_outputs, by_maps, by_groups;
};

template <class S>
PNN_DEVICE Part part_make(const Layer &layer, const Grid &grid) {
  Part part;
  int64_t output_tile, map_tile;
  const int64_t tile = grid.first_tile + keep(static_cast<uint32_t>(blockIdx.x));
  const int64_t outputs_done = divide<true>(grid.by_outputs, tile, &output_tile);
  part.split = divide<true>(grid.by_groups, divide<true>(grid.by_maps, outputs_done, &map_tile), &part.group);
  part.t0 = output_tile * Shape<S>::outputs, part.k0 = map_tile * S::maps;
  const int64_t outputs = layer.group_outputs - part.t0, maps = layer.group_maps - part.k0;
  part.outputs = static_cast<int>(outputs < Shape<S>::outputs ? outputs : Shape<S>::outputs);
  part.maps = static_cast<int>(maps < S::maps ? maps : S::maps);
  part.q_begin = part.split * layer.split_columns;
  const int64_t pixels = layer.columns - part.q_begin;
  part.pixels = static_cast<int>(pixels < layer.split_columns ? pixels : layer.split_columns);
  part.gradient_step = grid.gradient_step;
  part.summed = 0; /* the blocks of the first maps share the rows out */
#pragma unroll
  for (int i = 0; i < 2 * S::row_blocks; i++) {
    int64_t block;
    divide<true>(grid.by_maps, i, &block);
    if (block == map_tile) part.summed |= 1u << i;
  }
  return part;
}

template <class D, class S, Fastest G, Way WAY, bool CENTRED>
__global__ void __launch_bounds__(Shape<S>::threads, S::blocks)
    weight_gradient_wgmma_kernel(const __grid_constant__ Layer layer, const __grid_constant__ Grid grid) {
  using H = Shape<S>;
  constexpr int R = S::row_blocks;
  PNN_SHARED_MEMORY(memory);
  float d[R][S::maps / 2];
#pragma unroll
  for (int b = 0; b < R; b++) {
#pragma unroll
    for (int i = 0; i < S::maps / 2; i++) d[b][i] = 0;
    products_start(d[b]);
  }
  if (layer.masks_shift == 0)
    add_products<D, S, G, WAY == PLAIN_PIXELS, CENTRED, 1>(layer, part_make<S>(layer, grid), memory, d);
  else if (layer.masks_shift == 1)
    add_products<D, S, G, WAY == PLAIN_PIXELS, CENTRED, 2>(layer, part_make<S>(layer, grid), memory, d);
  else if (layer.masks_shift == 2)
    add_products<D, S, G, WAY == PLAIN_PIXELS, CENTRED, 4>(layer, part_make<S>(layer, grid), memory, d);
  else if (layer.masks_shift == 3)
    add_products<D, S, G, WAY == PLAIN_PIXELS, CENTRED, 8>(layer, part_make<S>(layer, grid), memory, d);
  else
    add_products<D, S, G, WAY == PLAIN_PIXELS, CENTRED, 16>(layer, part_make<S>(layer, grid), memory, d);

  /* Made again: kept, it would take registers all the way. */
  const Part part = part_make<S>(layer, grid);
  const int thread = thread_index(), lane = thread % 32, quad = thread % 4;
  const int row = (thread / 128 * 64 + thread / 32 % 4 * 16) * R + lane / 4 * 2 * R;
  const int64_t first = part.split * layer.outputs + part.group * layer.group_outputs + part.t0 + row;
  if (part.summed) {
    const float *const sums = totals_in<S>(memory);
#pragma unroll
    for (int i = 0; i < 2 * R; i++) {
      float sum = sums[i * H::threads];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (quad == 0 && part.summed >> i & 1 && row + i < part.outputs)
        static_cast<float *>(layer.totals)[first + i] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * R; i++) {
    float *const to = static_cast<float *>(layer.products) + (first + i) * layer.group_maps + part.k0 + quad * 2;
#pragma unroll
    for (int n = 0; n < S::maps / 8; n++) {
      const float *const sums = d[i / 2] + n * 4 + i % 2 * 2;
      if (row + i < part.outputs && n * 8 < part.maps)
        store_global(reinterpret_cast<words2 *>(to + n * 8), words2{{bits_of(sums[0]), bits_of(sums[1])}});
    }
  }
}

/* ---- the host's side ---- */

/* Bytes from one pixel of g to the next, over all rows and images; 0 where there is no such number. */
int64_t gradient_step(const Layer &layer) {
  const View &v = layer.grad_output;
  const int64_t width = static_cast<int64_t>(layer.by_width.divisor), height = layer.pixels / width;
  const int64_t step = width > 1 ? v.column : height > 1 ? v.row : v.batch;
  const bool even = (height == 1 || v.row == width * step) && (layer.batch == 1 || v.batch == layer.pixels * step);
  return even ? step * 2 : 0;
}

/* The widest tile that the outputs fill by more than half and that gives a large GPU enough blocks, if each takes 256
 * pixels. Results do not depend on it, but for the number of pieces. */
template <class S>
bool is_chosen(const Layer &layer) {
  return layer.group_outputs > Shape<S>::outputs / 2 && ceil_div(layer.group_outputs, Shape<S>::outputs) *
                                                                ceil_div(layer.group_maps, S::maps) * layer.groups *
                                                                ceil_div(layer.columns, 256) >=
                                                            wanted_blocks() * S::blocks;
}

template <class S>
WgmmaTiles tiles_of(const Layer &layer) {
  return {ceil_div(layer.group_outputs, Shape<S>::outputs) * ceil_div(layer.group_maps, S::maps) * layer.groups,
          multiprocessors() * S::blocks};
}

template <class D, class S, Fastest G, Way WAY, bool CENTRED>
Status launch(const Layer &layer, Stream stream) {
  const int64_t outputs = ceil_div(layer.group_outputs, Shape<S>::outputs), maps = ceil_div(layer.group_maps, S::maps);
  Grid grid;
  grid.gradient_step = G == ROWS_FASTEST ? gradient_step(layer) : 0;
  grid.by_outputs = divider_make(outputs);
  grid.by_maps = divider_make(maps);
  grid.by_groups = divider_make(layer.groups);
  const int64_t tiles = outputs * maps * layer.groups * layer.splits;
  Status status = STATUS_OK;
  for (grid.first_tile = 0; grid.first_tile < tiles && status == STATUS_OK; grid.first_tile += GRID_MOST) {
    const int64_t blocks = tiles - grid.first_tile < GRID_MOST ? tiles - grid.first_tile : GRID_MOST;
    const auto kernel = weight_gradient_wgmma_kernel<D, S, G, WAY, CENTRED>;
    PNN_LAUNCH(status, kernel, blocks, Shape<S>::threads, Shape<S>::bytes, stream, layer, grid);
  }
  return status;
}

template <class D, class S, Fastest G, Way WAY>
Status choose_kind(const Layer &layer, Stream stream) {
  return layer.mean ? launch<D, S, G, WAY, true>(layer, stream) : launch<D, S, G, WAY, false>(layer, stream);
}

template <class D, class S>
Status run(const Layer &layer, Stream stream) {
  const bool rows = layer.grad_output_staging == STAGE_CHANNELS;
  if (way_of<D>(layer) == PLAIN_PIXELS)
    return rows ? choose_kind<D, S, ROWS_FASTEST, PLAIN_PIXELS>(layer, stream)
                : choose_kind<D, S, DEPTH_FASTEST, PLAIN_PIXELS>(layer, stream);
  return rows ? choose_kind<D, S, ROWS_FASTEST, PLAIN_CHANNELS>(layer, stream)
              : choose_kind<D, S, DEPTH_FASTEST, PLAIN_CHANNELS>(layer, stream);
}

template <class D>
Status choose(const Layer &layer, Stream stream) {
  if (is_chosen<Wide>(layer)) return run<D, Wide>(layer, stream);
  if (is_chosen<Middle>(layer)) return run<D, Middle>(layer, stream);
  return run<D, Narrow>(layer, stream);
}

template <class S>
void list(Visit visit, const std::string &name) {
  for (const char *order : {" depth", " rows"})
    for (const char *way : {" pixels", " channels"})
      for (const char *kind : {"", " centred"})
        visit((name + order + way + kind).c_str(), Shape<S>::threads, Shape<S>::bytes);
}

}  // namespace

bool weight_gradient_wgmma_may_fit(const Layer &layer, int product) {
  return (product == PNN_BFLOAT16 || product == PNN_FLOAT16) && is_plain<bfloat16>(layer) &&
         layer.group_outputs > Shape<Narrow>::outputs / 2 && layer.columns > 0;
}

WgmmaTiles weight_gradient_wgmma_tiles(const Layer &layer) {
  if (is_chosen<Wide>(layer)) return tiles_of<Wide>(layer);
  if (is_chosen<Middle>(layer)) return tiles_of<Middle>(layer);
  return tiles_of<Narrow>(layer);
}

bool weight_gradient_wgmma_fits(const Layer &layer, int product) {
  if (!weight_gradient_wgmma_may_fit(layer, product) || way_of<bfloat16>(layer) == ANY_WAY || !layer.products)
    return false;
  const bool whole =
      layer.grad_output_staging == STAGE_PIXELS ||
      (layer.grad_output_staging == STAGE_CHANNELS && layer.group_outputs % 8 == 0 && gradient_step(layer) != 0);
  return whole && has_wgmma();
}

void list_weight_gradient_wgmma(Visit visit) {
  for (const std::string type : {"bfloat16", "float16"}) {
    list<Wide>(visit, "weight_gradient_wgmma " + type + " Wide");
    list<Middle>(visit, "weight_gradient_wgmma " + type + " Middle");
    list<Narrow>(visit, "weight_gradient_wgmma " + type + " Narrow");
  }
}

Status run_weight_gradient_wgmma(const Layer &layer, int product, Stream stream) {
  if (product == PNN_BFLOAT16) return choose<bfloat16>(layer, stream);
  return choose<float16>(layer, stream);
}

}  // namespace pnn_cuda
