/*
 * tile.h - one block's part of a matrix product: C[ROWS][COLUMNS] += A * B over DEPTH, both operands in shared memory.
 *
 * An operand lies in one of two orders, named by which index is contiguous:
 *
 *     DEPTH_FASTEST   [row][depth], 64 bytes of depth and 16 of padding to a row
 *     ROWS_FASTEST    [depth][row], all the tile's rows and 16 bytes of padding to a depth
 * (32 with TF32). With either, eight rows of 16 bytes fall into different banks. 16-bit operands go through ldmatrix
 * (transposed for ROWS_FASTEST) to the tensor cores; a warp holds 16x8 blocks of C. TF32 operands do so from
 * DEPTH_FASTEST, where a row of an 8x8 matrix is four numbers, and go one by one from ROWS_FASTEST, since ldmatrix
 * transposes 16-bit numbers only. float and double go by fused multiply-adds, in ascending depth for each element of C,
 * so float32 has the CPU's bits wherever the activation has.
 */
#ifndef PNN_CUDA_TILE_H
#define PNN_CUDA_TILE_H

#include <type_traits>

#include "layer.h"

namespace pnn_cuda {

enum Fastest { DEPTH_FASTEST, ROWS_FASTEST };

template <class D>
struct Depth {
  static constexpr int value = 64 / static_cast<int>(sizeof(D));  /* of one step of the pipeline */
  static constexpr int vector = 16 / static_cast<int>(sizeof(D)); /* elements in 16 bytes */
  static constexpr int padding = 16;                              /* bytes behind a depth of ROWS_FASTEST */
};
template <>
struct Depth<tf32> {
  static constexpr int value = 16, vector = 4;
  static constexpr int padding = 32; /* four depths of eight numbers meet all 32 banks once */
};

/* Bytes from one row (or one depth) to the next, and of the whole tile. */
template <class D>
PNN_HOST_DEVICE constexpr int pitch_of(Fastest fastest, int rows) {
  return fastest == DEPTH_FASTEST ? 80 : rows * static_cast<int>(sizeof(D)) + Depth<D>::padding;
}
template <class D>
PNN_HOST_DEVICE constexpr int bytes_of(Fastest fastest, int rows) {
  return fastest == DEPTH_FASTEST ? rows * 80 : Depth<D>::value * pitch_of<D>(ROWS_FASTEST, rows);
}

PNN_DEVICE float real_at(const words4 &v, int i, float) { return float_of(v.w[i]); }
PNN_DEVICE double real_at(const words4 &v, int i, double) {
  return double_of(static_cast<uint64_t>(v.w[2 * i + 1]) << 32 | v.w[2 * i]);
}

/* float and double: each thread holds ROWS/R x COLUMNS/8 elements of C. B_MADE: operand B was written by store_run, so
 * it is rounded to TF32 already; it means nothing to other types. */
template <class D, int ROWS, int COLUMNS, int THREADS, Fastest A, Fastest B, bool B_MADE = true>
struct Tile {
  using R = D;
  static constexpr int V = Depth<D>::vector;
  static constexpr int N = 8, LANES_N = COLUMNS / N, LANES_M = THREADS / LANES_N, M = ROWS / LANES_M;
  R c[M][N];

  /* The i-th of a thread's rows: neighbours in lanes where depth is contiguous, neighbours in a vector where rows are.
   */
  template <Fastest F, int LANES>
  static PNN_DEVICE int index(int i, int lane) {
    return F == DEPTH_FASTEST ? i * LANES + lane : i / V * (V * LANES) + lane * V + i % V;
  }
  static PNN_DEVICE int lane_m() { return thread_index() / LANES_N; }
  static PNN_DEVICE int lane_n() { return thread_index() % LANES_N; }

  /* f(row) -> the first value of the row's elements. */
  template <class F>
  PNN_DEVICE void start(F f) {
#pragma unroll
    for (int i = 0; i < M; i++) {
      const R first = f(index<A, LANES_M>(i, lane_m()));
#pragma unroll
      for (int j = 0; j < N; j++) c[i][j] = first;
    }
  }
  /* f(row, column, value) */
  template <class F>
  PNN_DEVICE void each(F f) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int j = 0; j < N; j++) f(index<A, LANES_M>(i, lane_m()), index<B, LANES_N>(j, lane_n()), c[i][j]);
  }

  template <Fastest F, int COUNT, int LANES, int ROWS_OF>
  static PNN_DEVICE void load(const char *tile, int depth, int lane, R x[COUNT][V]) {
    constexpr int pitch = pitch_of<D>(F, ROWS_OF);
    if constexpr (F == DEPTH_FASTEST) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const char *at = tile + index<F, LANES>(i, lane) * pitch + depth * static_cast<int>(sizeof(R));
        const words4 v = load_shared(reinterpret_cast<const words4 *>(at));
#pragma unroll
        for (int e = 0; e < V; e++) x[i][e] = real_at(v, e, R());
      }
    } else {
#pragma unroll
      for (int e = 0; e < V; e++)
#pragma unroll
        for (int i = 0; i < COUNT; i += V) {
          const char *at = tile + (depth + e) * pitch + index<F, LANES>(i, lane) * static_cast<int>(sizeof(R));
          const words4 v = load_shared(reinterpret_cast<const words4 *>(at));
#pragma unroll
          for (int r = 0; r < V; r++) x[i + r][e] = real_at(v, r, R());
        }
    }
  }

  PNN_DEVICE void add_product(const char *a, const char *b) {
#pragma unroll
    for (int depth = 0; depth < Depth<D>::value; depth += V) {
      R x[M][V], y[N][V];
      load<A, M, LANES_M, ROWS>(a, depth, lane_m(), x);
      load<B, N, LANES_N, COLUMNS>(b, depth, lane_n(), y);
#pragma unroll
      for (int e = 0; e < V; e++)
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
          for (int j = 0; j < N; j++) c[i][j] = fma_(x[i][e], y[j][e], c[i][j]);
    }
  }
};

/* On the tensor cores: two rows of warps. The product below is that of 16-bit types. */
template <class D, int ROWS, int COLUMNS, int THREADS, Fastest A, Fastest B>
struct TensorTile {
  using R = float;
  static constexpr int WARPS_N = THREADS / 64, WARP_M = ROWS / 2, WARP_N = COLUMNS / WARPS_N;
  static constexpr int M = WARP_M / 16, N = WARP_N / 8;
  R c[M][N][4];

  static PNN_DEVICE int lane() { return thread_index() % 32; }
  static PNN_DEVICE int first_row() { return thread_index() / 32 / WARPS_N * WARP_M; }
  static PNN_DEVICE int first_column() { return thread_index() / 32 % WARPS_N * WARP_N; }
  static PNN_DEVICE int row(int i, int e) { return first_row() + i * 16 + lane() / 4 + e / 2 * 8; }
  static PNN_DEVICE int column(int j, int e) { return first_column() + j * 8 + lane() % 4 * 2 + e % 2; }

  template <class F>
  PNN_DEVICE void start(F f) {
#pragma unroll
    for (int i = 0; i < M; i++) {
      const R low = f(row(i, 0)), high = f(row(i, 2));
#pragma unroll
      for (int j = 0; j < N; j++) c[i][j][0] = c[i][j][1] = low, c[i][j][2] = c[i][j][3] = high;
    }
  }
  template <class F>
  PNN_DEVICE void each(F f) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) f(row(i, e), column(j, e), c[i][j][e]);
  }

  /* Four 8x8 matrices at (row, depth): of a, in the order (low, low), (high, low), (low, high), (high, high) of (row,
   * depth); of b, (low, low), (low, high), (high, low), (high, high). */
  template <Fastest F, int ROWS_OF, bool ROW_FIRST>
  static PNN_DEVICE void load(const char *tile, int row, int depth, uint32_t r[4]) {
    constexpr int pitch = pitch_of<D>(F, ROWS_OF);
    const int matrix = lane() / 8, i = lane() % 8;
    row += (ROW_FIRST ? matrix % 2 : matrix / 2) * 8;
    depth += (ROW_FIRST ? matrix / 2 : matrix % 2) * 8;
    if constexpr (F == DEPTH_FASTEST)
      load_matrices(r, tile + (row + i) * pitch + depth * 2);
    else
      load_matrices_transposed(r, tile + (depth + i) * pitch + row * 2);
  }

  PNN_DEVICE void add_product(const char *a, const char *b) {
#pragma unroll
    for (int depth = 0; depth < Depth<D>::value; depth += 16) {
      uint32_t x[M][4], y[N / 2][4];
#pragma unroll
      for (int i = 0; i < M; i++) load<A, ROWS, true>(a, first_row() + i * 16, depth, x[i]);
#pragma unroll
      for (int j = 0; j < N / 2; j++) load<B, COLUMNS, false>(b, first_column() + j * 16, depth, y[j]);
#pragma unroll
      for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++) multiply(D{}, c[i][j], x[i], &y[j / 2][j % 2 * 2]);
    }
  }
};

template <int ROWS, int COLUMNS, int THREADS, Fastest A, Fastest B, bool B_MADE>
struct Tile<bfloat16, ROWS, COLUMNS, THREADS, A, B, B_MADE> : TensorTile<bfloat16, ROWS, COLUMNS, THREADS, A, B> {};
template <int ROWS, int COLUMNS, int THREADS, Fastest A, Fastest B, bool B_MADE>
struct Tile<float16, ROWS, COLUMNS, THREADS, A, B, B_MADE> : TensorTile<float16, ROWS, COLUMNS, THREADS, A, B> {};

/* TF32: an operand that came as it is stored is rounded here, from shared memory to the tensor cores. */
template <int ROWS, int COLUMNS, int THREADS, Fastest A, Fastest B, bool B_MADE>
struct Tile<tf32, ROWS, COLUMNS, THREADS, A, B, B_MADE> : TensorTile<tf32, ROWS, COLUMNS, THREADS, A, B> {
  using Base = TensorTile<tf32, ROWS, COLUMNS, THREADS, A, B>;
  using Base::c;

  /* Four 8x4 blocks at (row, depth), in the orders of TensorTile::load: lane i gets of each the element at row i / 4,
   * depth i % 4. */
  template <Fastest F, int ROWS_OF, bool ROW_FIRST, bool ROUND>
  static PNN_DEVICE void load(const char *tile, int row, int depth, uint32_t r[4]) {
    constexpr int pitch = pitch_of<tf32>(F, ROWS_OF);
    const int lane = Base::lane();
    if constexpr (F == DEPTH_FASTEST) {
      const int matrix = lane / 8, i = lane % 8;
      row += (ROW_FIRST ? matrix % 2 : matrix / 2) * 8;
      depth += (ROW_FIRST ? matrix / 2 : matrix % 2) * 4;
      load_matrices(r, tile + (row + i) * pitch + depth * 4);
    } else {
#pragma unroll
      for (int block = 0; block < 4; block++) {
        const int at_row = row + (ROW_FIRST ? block % 2 : block / 2) * 8 + lane / 4;
        const int at_depth = depth + (ROW_FIRST ? block / 2 : block % 2) * 4 + lane % 4;
        r[block] = bits_of(load_shared(reinterpret_cast<const float *>(tile + at_depth * pitch + at_row * 4)));
      }
    }
    if constexpr (ROUND) {
#pragma unroll
      for (int block = 0; block < 4; block++) r[block] = to_tf32(float_of(r[block]));
    }
  }

  PNN_DEVICE void add_product(const char *a, const char *b) {
#pragma unroll
    for (int depth = 0; depth < Depth<tf32>::value; depth += 8) {
      uint32_t x[Base::M][4], y[Base::N / 2][4];
#pragma unroll
      for (int i = 0; i < Base::M; i++) load<A, ROWS, true, true>(a, Base::first_row() + i * 16, depth, x[i]);
#pragma unroll
      for (int j = 0; j < Base::N / 2; j++)
        load<B, COLUMNS, false, !B_MADE>(b, Base::first_column() + j * 16, depth, y[j]);
#pragma unroll
      for (int i = 0; i < Base::M; i++)
#pragma unroll
        for (int j = 0; j < Base::N; j++) multiply_tf32(c[i][j], x[i], &y[j / 2][j % 2 * 2]);
    }
  }
};

/* ---- operands into shared memory ---- */

PNN_DEVICE int clamp_bytes(int64_t elements, int size) {
  return elements <= 0 ? 0 : elements * size >= 16 ? 16 : static_cast<int>(elements) * size;
}

/* Tiles of the weight, [row][column], asynchronously, zero beyond the group's. A thread keeps its place in the row and
 * goes down the rows; where it reads from moves on from tile to tile, so that nothing is multiplied on the way. WHOLE:
 * the group's maps are whole sixteens, so no 16 bytes end inside it. */
template <class D, int ROWS, int COLUMNS, int THREADS, bool WHOLE = false>
struct WeightTiles {
  static constexpr int SIZE = static_cast<int>(sizeof(D)), CHUNKS = COLUMNS * SIZE / 16, STEP = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "whole rows");
  using Count = std::conditional_t<WHOLE, int, int64_t>;
  const char *from;
  Count rows, columns; /* left from this thread's own */
  int place;           /* of its 16 bytes in the tile */

  /* The first tile's rows start at t0 of the group, its columns at k0. */
  PNN_DEVICE WeightTiles(const Layer &layer, int64_t group, int64_t t0, int64_t k0, int pitch) {
    const int first = thread_index() / CHUNKS;
    const int64_t k = k0 + thread_index() % CHUNKS * (16 / SIZE);
    from = layer.weight + ((group * layer.group_outputs + t0 + first) * layer.weight_step + k) * SIZE;
    rows = static_cast<Count>(layer.group_outputs - t0 - first);
    columns = static_cast<Count>(layer.group_maps - k);
    place = keep(first * pitch + thread_index() % CHUNKS * 16);
  }
  PNN_DEVICE void stage(const Layer &layer, char *to, int pitch) const {
    const int64_t step = STEP * layer.weight_step * SIZE;
    const char *at = from;
    to += place;
    if constexpr (WHOLE) {
#pragma unroll
      for (int r = 0; r < ROWS; r += STEP, at += step)
        copy_async16_or_zero(to + r * pitch, at, r < rows && columns > 0);
      return;
    }
    const int bytes = clamp_bytes(columns, SIZE);
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP, at += step) {
      const int valid = r < rows ? bytes : 0;
      copy_async16(to + r * pitch, valid ? at : layer.weight, valid);
    }
  }
  PNN_DEVICE void next_columns() {
    from += COLUMNS * SIZE;
    columns -= COLUMNS;
  }
  PNN_DEVICE void next_rows(const Layer &layer) {
    from += ROWS * layer.weight_step * SIZE;
    rows -= ROWS;
  }
};

/* Where the steps' tiles lie in a ring of STAGES, in bytes: of(i) is that of the step that is i ahead. A loop begins
 * STAGES - 1 steps before the first. */
template <int STAGES>
struct Ring {
  int at[STAGES];
  PNN_DEVICE explicit Ring(int bytes) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) at[i] = (i + 1) % STAGES * bytes;
  }
  PNN_DEVICE int of(int ahead) const { return at[ahead % STAGES]; }
  PNN_DEVICE void next() {
    const int first = at[0];
#pragma unroll
    for (int i = 0; i + 1 < STAGES; i++) at[i] = at[i + 1];
    at[STAGES - 1] = first;
  }
};

/* A tile of COLUMNS columns' channels, as many as one step of depth takes, [channel][column] with PIXELS, else
 * [column][channel], asynchronously, zeros beyond them. A thread keeps its columns, or its channels of a step, and
 * where they lie: all 16 bytes that it copies are of one group and one image. */
template <class D, int COLUMNS, int THREADS, bool PIXELS>
struct StepTiles {
  static constexpr int SIZE = static_cast<int>(sizeof(D)), V = 16 / SIZE, DEPTH = Depth<D>::value;
  static constexpr int LINES = PIXELS ? DEPTH : COLUMNS, LINE = PIXELS ? COLUMNS : DEPTH;
  static constexpr int CHUNKS = LINE / V, STEP = THREADS / CHUNKS, COUNT = LINES / STEP;
  static_assert(THREADS % CHUNKS == 0 && LINES % STEP == 0, "whole lines");
  const char *from[PIXELS ? 1 : COUNT];
  int64_t step; /* bytes from channel to channel */
  int most, last, columns, to, pitch;

  /* at(column): where a column stands in the view; `first`: the group's first channel, of `channels`; `most` of them
   * are of one step. */
  template <class At>
  PNN_DEVICE StepTiles(const View &view, int64_t first, int64_t channels, int most_, int columns_, int pitch_, At at)
      : pitch(pitch_) {
    const int line = thread_index() / CHUNKS, place = thread_index() % CHUNKS * V;
    step = (PIXELS ? view.channel : 1) * SIZE;
    const char *const data = view.data + (first + (PIXELS ? line : place)) * step;
#pragma unroll
    for (int i = 0; i < (PIXELS ? 1 : COUNT); i++) {
      const int column = PIXELS ? place : line + i * STEP;
      from[i] = keep(data + (column < columns_ ? at(column) : 0) * SIZE);
    }
    last = static_cast<int>(channels) - (PIXELS ? line : place);
    if (!PIXELS && place >= most_) last = 0;
    most = keep(PIXELS && place < columns_ ? most_ - line : 0);
    last = keep(last);
    columns = keep(columns_ - line);
    to = keep(line * pitch + place * SIZE);
  }
  /* The channels from c0 on. */
  PNN_DEVICE void load(int c0, char *tile) const {
    const int left = last - c0, count = left < most ? left : most;
    const int64_t offset = static_cast<int64_t>(static_cast<uint32_t>(c0)) * step;
    const char *here = from[0] + offset;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (!PIXELS && i > 0) here = from[i] + offset;
      copy_async16_or_zero(tile + to + i * STEP * pitch, here,
                           PIXELS ? i * STEP < count : left > 0 && i * STEP < columns);
      if (PIXELS) here += STEP * step;
    }
  }
};

/* Channels [c0, c0 + count) below `end` of columns [0, COLUMNS) of a view into shared memory, count <= CHANNELS:
 * [channel][column] along the pixels (and with STAGE_ELEMENTS, but at once), [column][channel] with
 * STAGE_CHANNELS, where c0 is a multiple of 16 bytes. offset(j, &at) tells whether column j is there, and its place in
 * the view. */
template <int SIZE, int CHANNELS, int COLUMNS, int THREADS, class Offset>
PNN_DEVICE void stage_view(const View &v, int staging, int64_t c0, int count, int64_t end, int64_t group_first,
                           char *to, int pitch, Offset offset) {
  constexpr int V = 16 / SIZE;
  const int thread = thread_index();
  int64_t at;
  if (staging == STAGE_PIXELS) {
    /* A thread keeps its pixels and goes through the channels. */
    constexpr int CHUNKS = COLUMNS / V, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0, "whole channels");
    const int first = thread / CHUNKS, j = thread % CHUNKS * V;
    const bool here = offset(j, &at);
    const int channels = static_cast<int>(end - c0 < count ? end - c0 : count);
    const char *from = v.data + (at + (group_first + c0 + first) * v.channel) * SIZE;
    to += first * pitch + j * SIZE;
#pragma unroll
    for (int r = first; r < first + CHANNELS; r += STEP) {
      if (r < count) {
        const bool valid = here && r < channels;
        copy_async16(to, valid ? from : v.data, valid ? 16 : 0);
      }
      to += STEP * pitch;
      from += STEP * v.channel * SIZE;
    }
  } else if (staging == STAGE_CHANNELS) {
    /* A thread keeps its channels and goes through the pixels. */
    constexpr int CHUNKS = CHANNELS / V, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && COLUMNS % STEP == 0, "whole pixels");
    const int first = thread / CHUNKS, r = thread % CHUNKS * V;
    if (r >= count) return;
    const int bytes = clamp_bytes(end - c0 - r, SIZE);
    const char *const from = v.data + (group_first + c0 + r) * SIZE;
    to += first * pitch + r * SIZE;
#pragma unroll
    for (int j = 0; j < COLUMNS; j += STEP) {
      const int valid = offset(first + j, &at) ? bytes : 0;
      copy_async16(to + j * pitch, valid ? from + at * SIZE : v.data, valid);
    }
  } else {
    /* Words, or single elements. */
    const bool words = SIZE <= 4 && staging == STAGE_WORDS;
    const int run = words ? 4 / SIZE : 1;
#pragma unroll 1
    for (int i = thread * run; i < count * COLUMNS; i += THREADS * run) {
      const int r = i / COLUMNS, j = i % COLUMNS;
      const bool here = offset(j, &at) && c0 + r < end;
      const char *const from = v.data + (here ? at + (group_first + c0 + r) * v.channel : 0) * SIZE;
      char *const into = to + r * pitch + j * SIZE;
      if (words)
        copy_async4_or_zero(into, from, here);
      else if constexpr (SIZE == 2)
        *reinterpret_cast<uint16_t *>(into) = here ? *reinterpret_cast<const uint16_t *>(from) : uint16_t(0);
      else if constexpr (SIZE == 4)
        *reinterpret_cast<uint32_t *>(into) = here ? *reinterpret_cast<const uint32_t *>(from) : 0u;
      else
        *reinterpret_cast<uint64_t *>(into) = here ? *reinterpret_cast<const uint64_t *>(from) : uint64_t(0);
    }
  }
}

/* Sixteen zeros of D. */
template <class D>
PNN_DEVICE void store_zeros(D *to) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(D)); i++)
    store_shared(reinterpret_cast<words4 *>(to) + i, words4{{0, 0, 0, 0}});
}
/* Eight reals, rounded to D, to 16-byte aligned shared memory. */
PNN_DEVICE void store_run(bfloat16 *to, const float v[8]) {
  words4 w;
#pragma unroll
  for (int i = 0; i < 4; i++) w.w[i] = round_pair(bfloat16{}, v[2 * i], v[2 * i + 1]);
  store_shared(reinterpret_cast<words4 *>(to), w);
}
PNN_DEVICE void store_run(float16 *to, const float v[8]) {
  words4 w;
#pragma unroll
  for (int i = 0; i < 4; i++) w.w[i] = round_pair(float16{}, v[2 * i], v[2 * i + 1]);
  store_shared(reinterpret_cast<words4 *>(to), w);
}
PNN_DEVICE void store_run(float *to, const float v[8]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    words4 w;
#pragma unroll
    for (int i = 0; i < 4; i++) w.w[i] = bits_of(v[h * 4 + i]);
    store_shared(reinterpret_cast<words4 *>(to) + h, w);
  }
}
PNN_DEVICE void store_run(tf32 *to, const float v[8]) {
  float rounded[8];
#pragma unroll
  for (int i = 0; i < 8; i++) rounded[i] = float_of(to_tf32(v[i]));
  store_run(&to->value, rounded);
}
PNN_DEVICE void store_run(double *to, const double v[8]) {
#pragma unroll
  for (int h = 0; h < 4; h++) {
    words4 w;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint64_t bits = bits_of(v[h * 2 + i]);
      w.w[2 * i] = static_cast<uint32_t>(bits);
      w.w[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
    store_shared(reinterpret_cast<words4 *>(to) + h, w);
  }
}

/* store_run of the eight numbers' relu. Which zero is stored means nothing to the tensor cores' sums; float32's chains
 * of fused multiply-adds keep the CPU's. */
template <class D>
PNN_DEVICE void store_run_relu(D *to, const float v[8]) {
  if constexpr (sizeof(D) == 2) {
    words4 w;
#pragma unroll
    for (int i = 0; i < 4; i++) w.w[i] = round_pair_relu(D{}, v[2 * i], v[2 * i + 1]);
    store_shared(reinterpret_cast<words4 *>(to), w);
  } else {
    float relu[8];
#pragma unroll
    for (int i = 0; i < 8; i++) relu[i] = v[i] < 0 ? 0.0f : v[i];
    store_run(to, relu);
  }
}
PNN_DEVICE void store_run_relu(tf32 *to, const float v[8]) {
  float relu[8];
#pragma unroll
  for (int i = 0; i < 8; i++) relu[i] = relu_any_zero(v[i]);
  store_run(to, relu);
}

/* 16 bytes of D, rounded from reals. */
template <class D, class R>
PNN_DEVICE words4 vector_made(const R *v) {
  constexpr int V = Depth<D>::vector;
  words4 out;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(R) == 8) {
      const uint64_t bits = bits_of(v[i / 2]);
      out.w[i] = static_cast<uint32_t>(i % 2 ? bits >> 32 : bits);
    } else if constexpr (V == 4) { /* float: as it is */
      out.w[i] = bits_of(v[i]);
    } else {
      out.w[i] = static_cast<uint32_t>(round_to(D{}, v[2 * i + 1]).bits) << 16 | round_to(D{}, v[2 * i]).bits;
    }
  }
  return out;
}

/* 16 bytes of reals from shared memory, rounded to D, to 16-byte aligned device memory. */
template <class D, class R>
PNN_DEVICE void store_vector(D *to, const R *sums) {
  constexpr int V = Depth<D>::vector, W = 16 / static_cast<int>(sizeof(R));
  words4 out;
  if constexpr (V == W) { /* float, double: as they are */
    out = load_shared(reinterpret_cast<const words4 *>(sums));
  } else {
    const words4 a = load_shared(reinterpret_cast<const words4 *>(sums));
    const words4 b = load_shared(reinterpret_cast<const words4 *>(sums) + 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const words4 &from = i < 2 ? a : b;
      out.w[i] = static_cast<uint32_t>(round_to(D{}, float_of(from.w[i % 2 * 2 + 1])).bits) << 16 |
                 round_to(D{}, float_of(from.w[i % 2 * 2])).bits;
    }
  }
  store_global(reinterpret_cast<words4 *>(to), out);
}

}  // namespace pnn_cuda

#endif
