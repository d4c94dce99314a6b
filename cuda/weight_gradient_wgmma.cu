/*
 * weight_gradient_wgmma.cu - the weight gradient of plain layers (response.h) in 16-bit types and TF32 by Hopper's
 * asynchronous products, for sm_90a alone.
 *
 * As in weight_gradient.cu, G[t,k] = sum over q of g[t,q] * response[k,q] and h[t] = sum over q of g[t,q], of a block's
 * piece of the pixels: D [output][map] += A [output][pixel] * B [pixel][map], 64 outputs to a product. A is g as it is
 * stored, of TF32 rounded, in the registers that the tensor cores read; B is made by all threads and goes through
 * shared memory. Products run while the same threads make the operand of the next step:
 *
 *     g --cp.async, a step ahead--> shared memory ----------------------------> registers: A ----------> wgmma
 *     x --cp.async, a step ahead--> shared memory --masks, relu, rounding--> shared memory: B, two steps' --^
 *
 * Neither is loaded into registers ahead of its use: a warp has six scoreboards, and what shares one with such a load
 * waits for it.
 *
 * With normalisation, CENTRED, the response is the one minus its mean.
 *
 * A step takes 64 pixels, 32 of TF32, in two halves. A thread of a product owns the depths {2t, 2t+1, 2t+8, 2t+9} (t =
 * lane % 4), of TF32 {t, t+4}, of rows i and i + 8 (i = lane / 4). Which pixels and outputs stand there is free, as
 * long as B has the same pixels. In 16-bit types:
 *
 *     depths   thread t's, of a half's two products together, are the pixels 8 t to 8 t + 7: 16 bytes of g where the
 *              pixels are contiguous
 *     rows     thread i's, of a warpgroup's one or two blocks of 64, are neighbouring outputs: one load of g where the
 *              channels are contiguous
 *
 * Of TF32 the pixels stand in order, so that ldmatrix gives a product's A where the pixels are contiguous, and a row's
 * two of each block are neighbouring outputs. (The rounding works in place: whatever else is loaded than A itself takes
 * a move besides.) TF32 has no transposed B, in which a pixel's maps would lie in a row: a warp stores 32 pixels'
 * numbers map by map.
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

/* Of x's channels and g's outputs, and of B's maps, a step has one line of bytes in all types. */
constexpr int LINE = 128, LINE_WORDS = LINE / 4;
template <class D>
constexpr int PIXELS_OF = LINE_WORDS * NUMBERS<D>; /* a step's */
constexpr int BUFFERS = 2; /* of B: of this step, and of the last one, whose products may still run */
constexpr int STAGES = 2;  /* of x and g: of this step and of the next one */
constexpr int TABLES = 3;  /* of this step and of the next two */

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

/* Where a step's pixels stand, in bytes; pixels that are none as the piece's first one. Pairs of 16-bit types' pixels
 * in the order of `pair_of`. With room for those types' pixels. */
struct Table {
  uint32_t place[PIXELS_OF<bfloat16>][2]; /* row, column */
  int64_t input[PIXELS_OF<bfloat16>];     /* in order; where the pixels are contiguous, of runs of 16 bytes */
  int64_t gradient[LINE / 16];            /* of such runs */
};

template <class S>
struct Shape {
  static constexpr int threads = 128 * S::warpgroups, outputs = 64 * S::row_blocks * S::warpgroups;
  static constexpr int ITEMS = LINE_WORDS * (S::maps / SIXTEEN) / threads; /* words that a thread makes in a step */
  static_assert(ITEMS == 1 || ITEMS == 2, "one for each half, or one");
  /* B: core matrices of eight pixels (four of TF32) by eight maps, 128 bytes, the next maps' and then the next pixels'
   * behind them; 16 bytes between them, so that neither eight words' pixels nor four sixteens of maps meet in a bank.
   */
  static constexpr int column_step = 128 + 16, depth_step = S::maps / 8 * column_step + 16;
  static constexpr int buffer_bytes = LINE / 16 * depth_step;
  /* Of a step: the most x that Staged takes, and g. */
  static constexpr int input_bytes = S::maps * LINE + 512, gradient_bytes = outputs * LINE;
  static constexpr int tables_at = BUFFERS * buffer_bytes,
                       inputs_at = tables_at + TABLES * static_cast<int>(sizeof(Table)),
                       gradients_at = inputs_at + STAGES * input_bytes,
                       totals_at = gradients_at + STAGES * gradient_bytes,
                       means_at = totals_at + threads * 2 * S::row_blocks * 4, bytes = means_at + S::maps * 4;
};

/* Of the pair of pixels with number `quad` * 4 + `word` in a half (pixels 8 quad + 2 word and the next one). */
PNN_DEVICE int pair_of(int half, int quad, int word) { return (half * 4 + word) * 4 + quad; }

/* Where a thread's rows stand: of 16-bit types in a row, of TF32 two in each block of sixteen. */
template <class D, class S>
constexpr int NEIGHBOURS = sizeof(D) == 2 ? 2 * S::row_blocks : 2;
template <class D, class S>
PNN_DEVICE int further_row(int i) {
  return i / NEIGHBOURS<D, S> * 16 + i % NEIGHBOURS<D, S>;
}

/* A step's x of a tile's channels in shared memory: rows of a channel's pixels, or a row for each pixel, with room
 * behind each sixteen maps' or each word's rows, so that what threads read together meets in no bank. Of more than
 * sixteen masks to a channel there are fewer channels than this. */
template <class D, class S, bool PIXELS, int MASKS>
struct Staged {
  static constexpr int CHANNELS = S::maps / MASKS, COUNT = SIXTEEN / MASKS, V = Depth<D>::vector;
  static constexpr int RUNS_OF = PIXELS ? LINE / 16 : CHANNELS < V ? 1 : CHANNELS / V; /* of 16 bytes, in a row */
  static constexpr int ROWS = PIXELS ? CHANNELS : PIXELS_OF<D>;
  static constexpr int TOGETHER = PIXELS ? COUNT : NUMBERS<D>;
  static constexpr int ROOM = sizeof(D) == 4         ? (PIXELS || RUNS_OF % 2 ? 0 : 16)
                              : PIXELS || MASKS == 2 ? 64
                              : MASKS == 4           ? 32
                                                     : 16;
  static PNN_DEVICE int at(int row) { return row * RUNS_OF * 16 + row / TOGETHER * ROOM; }
  static_assert(ROWS * RUNS_OF * 16 + ROWS / TOGETHER * ROOM <= Shape<S>::input_bytes);
};

/* g of 16-bit types in shared memory, and as the products read it: for this thread's rows, eight of its pixels in each
 * half of a step. */
template <class D, class S, Fastest G>
struct Gradient {
  using H = Shape<S>;
  static constexpr int ROWS = 2 * S::row_blocks, WORDS = 4 * ROWS, HALF = PIXELS_OF<D> / 2;
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
  PNN_DEVICE Gradient(const Layer &layer, int64_t channel, int row, int outputs_, int64_t, char *memory_)
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
      for (int i = 0; i < PIXELS_OF<D> * RUNS_OF; i += H::threads) {
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

/* The same of TF32, whose words are pixels: those that thread t = lane % 4 has are every fourth one. */
template <class S, Fastest G>
struct Gradient<tf32, S, G> {
  using H = Shape<S>;
  static constexpr int R = S::row_blocks, ROWS = 2 * R, WORDS = 4 * ROWS, COUNT = PIXELS_OF<tf32>;
  /* Where the pixels are contiguous, a warp copies what it reads, its rows' lines, their 16 bytes in such an order that
   * those of eight rows meet in no bank. Where the channels are, the tile lies there as [pixel][output], its 16 bytes
   * in such an order that those of four pixels do not. */
  static constexpr int AHEAD = G == DEPTH_FASTEST ? 1 : 2;                      /* steps */
  static constexpr int RUNS_OF = H::outputs / 4;                                /* of 16 bytes, to a pixel */
  static constexpr int AT_ONCE = G == DEPTH_FASTEST ? 4 : H::threads / RUNS_OF; /* a warp's lines, the block's pixels */
  static constexpr int COPIES = (G == DEPTH_FASTEST ? 16 * R : COUNT) / AT_ONCE;
  static_assert(RUNS_OF % 8 == 0 && AT_ONCE % 4 == 0, "place_of moves runs among eight; a thread's copies keep theirs");
  static PNN_DEVICE int place_of(int run, int quad) { return (run ^ quad << 1) * 16; }

  const char *from; /* of the first line that this thread copies, or of its outputs */
  int64_t step;     /* bytes to its next copy's */
  char *memory;
  int to, own, left; /* where its first copy goes, where what it reads begins; outputs from its first one on */

  PNN_DEVICE Gradient(const Layer &layer, int64_t channel, int row, int outputs, int64_t pixel_step, char *memory_)
      : memory(memory_ + H::gradients_at) {
    const View &view = layer.grad_output;
    const int thread = thread_index(), lane = thread % 32, quad = lane % 4;
    int first; /* output */
    if constexpr (G == DEPTH_FASTEST) {
      const int line = thread / 32 * 16 * R, swizzled = (lane % 8 ^ lane / 16) * 16; /* the warp's first */
      first = line + lane / 8;
      from = view.data + (channel + first) * view.channel * 4;
      step = AT_ONCE * 4 * view.channel;
      to = keep(first * LINE + swizzled);
      own = keep((line + lane % 8 * 2 + lane / 8 % 2) * LINE + swizzled);
    } else {
      const int run = thread % RUNS_OF, pixel = thread / RUNS_OF;
      first = run * 4;
      from = view.data + (channel + first) * 4;
      step = AT_ONCE * pixel_step;
      to = keep(pixel * RUNS_OF * 16 + place_of(run, pixel % 4));
      own = keep(quad * RUNS_OF * 16 + place_of(row / 4, quad) + row % 4 * 4);
    }
    left = outputs - first;
  }
  template <class At>
  PNN_DEVICE void copy(int number, int count, const At &at) const {
    const int j = G == DEPTH_FASTEST ? thread_index() % 8 * 4 : thread_index() / RUNS_OF;
    const char *here = from + at(j);
#pragma unroll
    for (int i = 0; i < COPIES; i++, here += step) {
      if constexpr (G == DEPTH_FASTEST)
        copy_async16_or_zero(memory + (to ^ i % 4 * 32) + i * AT_ONCE * LINE, here,
                             (count == COUNT || j < count) && i * AT_ONCE < left);
      else
        copy_async16_or_zero(memory + number % STAGES * H::gradient_bytes + to + i * H::threads * 16, here,
                             (count == COUNT || j + i * AT_ONCE < count) && left > 0);
    }
  }
  /* A half's words in the order of two products' operands. */
  PNN_DEVICE void load(int number, int h, uint32_t (&raw)[WORDS]) const {
    if constexpr (G == DEPTH_FASTEST) {
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int b = 0; b < R; b++)
          load_matrices(raw + (i * R + b) * 4, memory + (own ^ (h * 2 + i) * 32) + b * 16 * LINE);
    } else {
      const char *const at = memory + number % STAGES * H::gradient_bytes + h * 16 * RUNS_OF * 16;
#pragma unroll
      for (int w = 0; w < 4; w++)
#pragma unroll
        for (int b = 0; b < R; b++) {
          const words2 v = load_shared(reinterpret_cast<const words2 *>(at + (own ^ b * 64) + w * 4 * RUNS_OF * 16));
          uint32_t *const to_ = raw + (w / 2 * R + b) * 4 + w % 2 * 2;
          to_[0] = v.w[0], to_[1] = v.w[1];
        }
    }
  }
  PNN_DEVICE void operand(const uint32_t (&raw)[WORDS], uint32_t, uint32_t (&a)[2][R][4]) const {
#pragma unroll
    for (int i = 0; i < WORDS; i++) a[i / 4 / R][i / 4 % R][i % 4] = to_tf32_even(float_of(raw[i]));
  }
  PNN_DEVICE void add_to(const uint32_t (&raw)[WORDS], uint32_t summed, float (&sums)[ROWS]) const {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      if (!(summed >> i & 1)) continue;
#pragma unroll
      for (int w = 0; w < 4; w++) sums[i] += float_of(raw[(w / 2 * R + i / 2) * 4 + w % 2 * 2 + i % 2]);
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
  constexpr int R = S::row_blocks, N = NUMBERS<D>, SIZE = static_cast<int>(sizeof(D)), V = 16 / SIZE;
  constexpr int COUNT = PIXELS_OF<D>, HALF = COUNT / 2; /* of pixels */
  Table *const tables = reinterpret_cast<Table *>(memory + H::tables_at);
  float *const totals = totals_in<S>(memory);
  char *const inputs = memory + H::inputs_at;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int first = (part.pixels - 1) % COUNT + 1; /* pixels of the first step */
  const int steps = (part.pixels + COUNT - 1) / COUNT;

  /* This thread's word's pixels, and sixteen maps: neighbouring lanes have x's neighbouring words, and stores that meet
   * no bank twice. Its second item is in 16-bit types the other half's, of TF32 the same pixel's of other maps. */
  int half, quad, word, sixteen;
  if (N == 1) {
    half = lane / 16, quad = lane % 4, word = lane / 4 % 4, sixteen = warp;
  } else if (PIXELS) {
    quad = lane % 4, word = lane / 4 % 4;
    half = H::ITEMS == 1 ? lane / 16 : 0;
    sixteen = H::ITEMS == 1 ? warp : warp * 2 + lane / 16;
  } else {
    constexpr int FOURS = S::maps / SIXTEEN / 4; /* of sixteens */
    word = lane / 4 % 4;
    quad = lane / 16 + warp % 2 * 2;
    sixteen = lane % 4 + warp / 2 % FOURS * 4;
    half = H::ITEMS == 1 ? warp / 2 / FOURS : 0;
  }
  constexpr int MORE = H::threads / 32; /* sixteens of maps to the second item's of TF32 */
  const int in_table = N == 1 ? lane : pair_of(half, quad, word) * 2;
  const int to = (half * 4 + word) * H::depth_step + sixteen * 2 * H::column_step + quad * (N == 2 ? 32 : 4);
  constexpr int TO_NEXT = N == 2 ? 4 * H::depth_step : MORE * 2 * H::column_step; /* bytes */
  const int k = static_cast<int>(part.k0) + (sixteen * SIXTEEN < part.maps ? sixteen * SIXTEEN : 0);
  const uint32_t block = static_cast<uint32_t>((part.group * layer.group_maps + k) / SIXTEEN);
  const int64_t channel = (PIXELS ? layer.input.channel : 1) * SIZE;
  const int tile_channel = static_cast<int>(part.k0) >> layer.masks_shift; /* the first one of the tile */
  const int channels = part.maps > 1 << layer.masks_shift ? part.maps >> layer.masks_shift : 1;
  /* Where x's channels are contiguous, from a run of 16 bytes on. */
  const int skipped = PIXELS ? 0 : tile_channel % V;
  const char *const input = layer.input.data + (part.group * layer.group_channels + tile_channel - skipped) * channel;
  using X = Staged<D, S, PIXELS, MASKS>;
  const int own_channel = (k >> layer.masks_shift) - tile_channel; /* in the tile */
  const int pixel = N == 1 ? lane : half * HALF + quad * V + word * N;
  const char *const own_input =
      inputs + (PIXELS ? X::at(own_channel) + pixel * SIZE : X::at(pixel) + (own_channel + skipped) * SIZE);
  int to_next_input; /* to the second item's, in bytes */
  if (N == 2) {
    to_next_input = PIXELS ? HALF * SIZE : X::at(HALF);
  } else {
    const int more =
        MASKS < SIXTEEN ? MORE * X::COUNT : ((k + MORE * SIXTEEN) >> layer.masks_shift) - (k >> layer.masks_shift);
    to_next_input = PIXELS ? X::at(more) : more * SIZE;
  }
  /* As many as there are registers for. */
  const PairKeys<R == 1 || (N == 1 && S::warpgroups == 2) ? 2 : 5> keys(seed_read(layer));
  const uint32_t constant = N == 1 ? keep(LATTICE) : LATTICE;
  const float level = layer.level_float;

  /* Of the piece's pixels, which is pixel j of a step; the first one where there is none. */
  const auto first_pixel = [&](int j) { return j < first ? part.pixels - first + j : 0; };
  const auto later_pixel = [&](int step, int j) { return step < steps ? (step - 1) * COUNT + j : 0; };
  const auto look_up = [&](int step, int j, int in_piece) {
    Table &table = tables[step % TABLES];
    const Place place = place_make<true>(layer, part.q_begin + in_piece);
    const Pixel pixel = pixel_make(layer, place);
    const int at = N == 1 ? j : pair_of(j / HALF, j / 8 % 4, j / 2 % 4) * 2 + j % 2;
    table.place[at][0] = pixel.row, table.place[at][1] = pixel.column;
    if (!PIXELS || j % V == 0) table.input[PIXELS ? j / V : j] = place_in(layer.input, place) * SIZE;
    if (G == DEPTH_FASTEST && j % V == 0) table.gradient[j / V] = place_in(layer.grad_output, place) * SIZE;
  };

  const int row = (thread / 128 * 64 + warp % 4 * 16) * R + lane / 4 * NEIGHBOURS<D, S>;
  const Gradient<D, S, G> gradient(layer, part.group * layer.group_outputs + part.t0, row, part.outputs,
                                   part.gradient_step, memory);
  /* Has a step's g copied to shared memory. */
  const auto copy_first_gradient = [&] {
    gradient.copy(0, first, [&](int j) {
      return G == DEPTH_FASTEST ? tables[0].gradient[j / V] : (part.q_begin + first_pixel(j)) * part.gradient_step;
    });
  };
  const auto copy_gradient = [&](int step) {
    gradient.copy(step, COUNT, [&](int j) {
      return G == DEPTH_FASTEST ? tables[step % TABLES].gradient[j / V]
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
      if ((ALL % H::threads == 0 || i + thread < ALL) && (PIXELS ? row : run * V) < channels)
        copy_async16(to_ + at + run * 16,
                     input + (PIXELS ? row * channel + table.input[run] : run * 16 + table.input[row]), 16);
    }
  };

  float *const means = reinterpret_cast<float *>(memory + H::means_at);
  if (CENTRED)
    for (int i = thread; i < S::maps; i += H::threads)
      means[i] =
          i < part.maps ? static_cast<const float *>(layer.mean)[part.group * layer.group_maps + part.k0 + i] : 0.0f;
  for (int i = thread; i < 2 * COUNT; i += H::threads)
    look_up(i / COUNT, i % COUNT, i < COUNT ? first_pixel(i) : later_pixel(1, i - COUNT));
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
    StagedInputs<D, PIXELS, MASKS> x;
    uint32_t words[2][4]; /* of the word's two pixels or, of TF32, of the two items */
#pragma unroll
    for (int own = 0; own < H::ITEMS; own++) { /* of the thread's items */
      const char *const at = own_input + step % STAGES * H::input_bytes + own * to_next_input;
      const char *const from[2] = {at, PIXELS || N == 1 ? nullptr : at + X::at(1)};
      if constexpr (N == 2) {
        const words4 places = load_shared(reinterpret_cast<const words4 *>(table.place[in_table + own * HALF]));
#pragma unroll
        for (int p = 0; p < 2; p++)
          words[p][0] = places.w[p * 2 + 1], words[p][1] = places.w[p * 2], words[p][2] = block, words[p][3] = 0;
        keys.philox(words);
      } else if (own == 0) {
        const words2 place = load_shared(reinterpret_cast<const words2 *>(table.place[in_table]));
#pragma unroll
        for (int i = 0; i < H::ITEMS; i++)
          words[i][0] = place.w[1], words[i][1] = place.w[0], words[i][2] = block + i * MORE, words[i][3] = 0;
        keys.template philox<H::ITEMS>(words);
      }
#pragma unroll
      for (int run = 0; run < 2; run++) {
        if (MASKS == 1 || run == 0) x.template load<true>(run, from, LINE);
        if (MASKS > 1 && run == 0) x.template load<true>(1, from, LINE);
        float center[RUN] = {};
        if constexpr (CENTRED) {
          const float *const at_maps = means + sixteen * SIXTEEN + (N == 1 ? own * MORE * SIXTEEN : 0);
#pragma unroll
          for (int i = 0; i < RUN; i += 4) {
            const words4 four = load_shared(reinterpret_cast<const words4 *>(at_maps + run * RUN + i));
#pragma unroll
            for (int e = 0; e < 4; e++) center[i + e] = float_of(four.w[e]);
          }
        }
        char *const at_run = buffer + to + own * TO_NEXT + run * H::column_step;
#pragma unroll
        for (int p = 0; p < N; p++) {
          words4 v;
#pragma unroll
          for (int i = 0; i < RUN / N; i++) {
            float u[N];
#pragma unroll
            for (int e = 0; e < N; e++) {
              const int map = run * RUN + i * N + e;
              u[e] = x.value(p, map) + level * lattice_in(words[N == 2 ? p : own][map / 4], map % 4, constant);
              if (CENTRED) u[e] = relu_any_zero(u[e]) - center[i * N + e];
            }
            if constexpr (N == 2)
              v.w[i] = CENTRED ? round_pair(D{}, u[0], u[1]) : round_pair_relu(D{}, u[0], u[1]);
            else
              store_shared(reinterpret_cast<uint32_t *>(at_run + i * 16),
                           CENTRED ? to_tf32_even(u[0]) : to_tf32_even_relu(u[0]));
          }
          if constexpr (N == 2) store_shared_whole(reinterpret_cast<words4 *>(at_run + p * 16), v);
        }
      }
    }
    /* No branch may stand between an operand and its product. */
    if (step == 0 && first < COUNT) { /* what is no pixel becomes zero */
#pragma unroll
      for (int i = 0; i < H::ITEMS * N; i++)
        if (pixel + (N == 2 ? i / 2 * HALF + i % 2 : 0) >= first) {
          char *const at = buffer + to + i / N * TO_NEXT + i % N * 16;
          if constexpr (N == 2) {
            store_shared_whole(reinterpret_cast<words4 *>(at), words4{{0, 0, 0, 0}});
            store_shared_whole(reinterpret_cast<words4 *>(at + H::column_step), words4{{0, 0, 0, 0}});
          } else {
#pragma unroll
            for (int e = 0; e < SIXTEEN; e++)
              store_shared(reinterpret_cast<uint32_t *>(at + e / RUN * H::column_step + e % RUN * 16), 0u);
          }
        }
    }
    if (thread / COUNT == step % (H::threads / COUNT)) {
      const int j = thread % COUNT;
      look_up(step + 2, j, later_pixel(step + 2, j));
    }
    copy_wait<0>(); /* what is copied in a step is there in the next one */
    if (N == 1 && G == DEPTH_FASTEST) __syncwarp();
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
      constexpr int NEXT = 2 * H::depth_step; /* product's, in bytes */
      const uint64_t descriptor =
          N == 2 ? matrix_descriptor_transposed(buffer + i * NEXT, H::depth_step, H::column_step)
                 : matrix_descriptor(buffer, H::depth_step, H::column_step) + static_cast<uint64_t>(i * NEXT / 16);
#pragma unroll
      for (int b = 0; b < R; b++) products_operand(a[i / 2][i % 2][b]);
#pragma unroll
      for (int b = 0; b < R; b++) {
        if constexpr (N == 2)
          products_add_transposed(D{}, d[b], a[i / 2][i % 2][b], descriptor);
        else
          products_add(D{}, d[b], a[i / 2][i % 2][b], descriptor);
      }
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
  const int row = (thread / 128 * 64 + thread / 32 % 4 * 16) * R + lane / 4 * NEIGHBOURS<D, S>;
  const int64_t first = part.split * layer.outputs + part.group * layer.group_outputs + part.t0 + row;
  if (part.summed) {
    const float *const sums = totals_in<S>(memory);
#pragma unroll
    for (int i = 0; i < 2 * R; i++) {
      float sum = sums[i * H::threads];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (quad == 0 && part.summed >> i & 1 && row + further_row<D, S>(i) < part.outputs)
        static_cast<float *>(layer.totals)[first + further_row<D, S>(i)] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * R; i++) {
    float *const to =
        static_cast<float *>(layer.products) + (first + further_row<D, S>(i)) * layer.group_maps + part.k0 + quad * 2;
#pragma unroll
    for (int n = 0; n < S::maps / 8; n++) {
      const float *const sums = d[i / 2] + n * 4 + i % 2 * 2;
      if (row + further_row<D, S>(i) < part.outputs && n * 8 < part.maps)
        store_global(reinterpret_cast<words2 *>(to + n * 8), words2{{bits_of(sums[0]), bits_of(sums[1])}});
    }
  }
}

/* ---- the host's side ---- */

/* Elements from one pixel of g to the next, over all rows and images; 0 where there is no such number. */
int64_t gradient_step(const Layer &layer) {
  const View &v = layer.grad_output;
  const int64_t width = static_cast<int64_t>(layer.by_width.divisor), height = layer.pixels / width;
  const int64_t step = width > 1 ? v.column : height > 1 ? v.row : v.batch;
  const bool even = (height == 1 || v.row == width * step) && (layer.batch == 1 || v.batch == layer.pixels * step);
  return even ? step : 0;
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
  grid.gradient_step = G == ROWS_FASTEST ? gradient_step(layer) * static_cast<int64_t>(sizeof(D)) : 0;
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
  const bool known = product == PNN_BFLOAT16 || product == PNN_FLOAT16 || product == PRODUCT_TF32;
  return known && is_plain<tf32>(layer) && layer.group_outputs > Shape<Narrow>::outputs / 2 && layer.columns > 0;
}

WgmmaTiles weight_gradient_wgmma_tiles(const Layer &layer) {
  if (is_chosen<Wide>(layer)) return tiles_of<Wide>(layer);
  if (is_chosen<Middle>(layer)) return tiles_of<Middle>(layer);
  return tiles_of<Narrow>(layer);
}

bool weight_gradient_wgmma_fits(const Layer &layer, int product) {
  const bool two = product != PRODUCT_TF32;
  if (!weight_gradient_wgmma_may_fit(layer, product) || !layer.products ||
      (two ? way_of<bfloat16>(layer) : way_of<tf32>(layer)) == ANY_WAY)
    return false;
  const bool whole = layer.grad_output_staging == STAGE_PIXELS ||
                     (layer.grad_output_staging == STAGE_CHANNELS && layer.group_outputs % (two ? 8 : 4) == 0 &&
                      gradient_step(layer) != 0);
  return whole && has_wgmma();
}

void list_weight_gradient_wgmma(Visit visit) {
  for (const std::string type : {"bfloat16", "float16", "tf32"}) {
    list<Wide>(visit, "weight_gradient_wgmma " + type + " Wide");
    list<Middle>(visit, "weight_gradient_wgmma " + type + " Middle");
    list<Narrow>(visit, "weight_gradient_wgmma " + type + " Narrow");
  }
}

Status run_weight_gradient_wgmma(const Layer &layer, int product, Stream stream) {
  if (product == PNN_BFLOAT16) return choose<bfloat16>(layer, stream);
  if (product == PNN_FLOAT16) return choose<float16>(layer, stream);
  return choose<tf32>(layer, stream);
}

}  // namespace pnn_cuda
