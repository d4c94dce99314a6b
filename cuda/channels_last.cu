/*
 * channels_last.cu - dense channels-last copies of x and g, for the kernels that multiply, where neither pixels nor
 * channels lie in runs of 16 bytes.
 *
 * Such tensors (7x7 images, layers with a stride) would travel number by number, each waited for, and once for each
 * tile that needs them; their copies, [image][pixel][channel] of the computed pixels alone, travel 16 bytes at a time.
 * A block transposes 32 pixels by 128 bytes of channels, in words of 4 bytes: a channel, or two neighbouring ones of 16
 * bits.
 *
 *     from --along the pixels, or the channels if they are contiguous--> registers, several loads in flight
 *          --> shared memory [pixel][word] --along the channels, 128 bytes to a warp--> to
 *
 * Pixels lie 33 words apart in shared memory: a warp meets all 32 banks once along either dimension.
 */
#include "kernels.h"

namespace pnn_cuda {
namespace {

constexpr int LANES = 32, THREADS = 256, STEP = THREADS / LANES;
constexpr int COLUMNS = LANES, WORDS = LANES, PITCH = WORDS + 1; /* of a tile */
constexpr int PLACES_BYTES = COLUMNS * static_cast<int>(sizeof(int64_t)), BYTES = PLACES_BYTES + COLUMNS * PITCH * 4;

PNN_HOST_DEVICE int size_of(const View &v) { return v.dtype == PNN_FLOAT32 ? 4 : 2; }

/* What a launch adds to the layer: the tiles of the first tensor, then those of the second, a pixel's channels next to
 * each other. */
struct Grid {
  ChannelsLast copy[2];
  Divider by_channel_tiles[2];
  int64_t first_tile, tiles; /* of the first tensor */
};

/* The channel at `from`, or two, `channel` elements apart. */
PNN_DEVICE uint32_t word_at(const uint32_t *from, int64_t) { return *from; }
PNN_DEVICE uint32_t word_at(const uint16_t *from, int64_t channel) {
  return *from | static_cast<uint32_t>(from[channel]) << 16;
}

/* E: an element's bits. */
template <class E>
PNN_DEVICE void copy_tile(const Layer &layer, const ChannelsLast &copy, int64_t column_tile, int64_t channel_tile,
                          char *memory) {
  constexpr int IN_WORD = 4 / static_cast<int>(sizeof(E)), COUNT = WORDS / STEP;
  int64_t *const places = reinterpret_cast<int64_t *>(memory);
  uint32_t *const tile = reinterpret_cast<uint32_t *>(memory + PLACES_BYTES);
  const int thread = thread_index(), lane = thread % LANES, first = thread / LANES;
  const int64_t column = column_tile * COLUMNS, channel = channel_tile * (WORDS * IN_WORD);
  const int64_t columns = layer.columns - column, words = (copy.channels - channel) / IN_WORD; /* or more */
  if (thread < COLUMNS)
    places[thread] = place_in(copy.from, place_make(layer, thread < columns ? column + thread : column));
  __syncthreads();

  const bool along_channels = copy.from.channel == 1;
  const E *const from = reinterpret_cast<const E *>(copy.from.data) + channel * copy.from.channel;
  uint32_t word[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int own = first + i * STEP, q = along_channels ? own : lane, w = along_channels ? lane : own;
    word[i] = 0;
    if (q < columns && w < words)
      word[i] = word_at(from + places[q] + w * IN_WORD * copy.from.channel, copy.from.channel);
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int own = first + i * STEP, q = along_channels ? own : lane, w = along_channels ? lane : own;
    note_store(tile + q * PITCH + w, 4);
    tile[q * PITCH + w] = word[i];
  }
  __syncthreads();
  uint32_t *const to = reinterpret_cast<uint32_t *>(copy.to.data) + (column * copy.channels + channel) / IN_WORD;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const int q = first + i * STEP;
    note_load(tile + q * PITCH + lane, 4);
    if (q < columns && lane < words) to[q * (copy.channels / IN_WORD) + lane] = tile[q * PITCH + lane];
  }
}

__global__ void __launch_bounds__(THREADS)
    channels_last_kernel(const __grid_constant__ Layer layer, const __grid_constant__ Grid grid) {
  PNN_SHARED_MEMORY(memory);
  const int64_t tile = grid.first_tile + blockIdx.x;
  const int second = tile >= grid.tiles;
  const ChannelsLast &copy = grid.copy[second];
  int64_t channel_tile;
  const int64_t column_tile = divide(grid.by_channel_tiles[second], second ? tile - grid.tiles : tile, &channel_tile);
  if (size_of(copy.from) == 2)
    copy_tile<uint16_t>(layer, copy, column_tile, channel_tile, memory);
  else
    copy_tile<uint32_t>(layer, copy, column_tile, channel_tile, memory);
}

}  // namespace

void list_channels_last(Visit visit) { visit("channels_last", THREADS, BYTES); }

Status run_channels_last(const Layer &layer, const ChannelsLast &x, const ChannelsLast &g, Stream stream) {
  Grid grid = {{x, g}, {}, 0, 0};
  int64_t tiles = 0;
  for (int i = 0; i < 2; i++) {
    const int64_t channel_tiles = ceil_div(grid.copy[i].channels * size_of(grid.copy[i].from), WORDS * 4);
    grid.by_channel_tiles[i] = divider_make(channel_tiles);
    grid.tiles = tiles;
    tiles += channel_tiles * ceil_div(layer.columns, COLUMNS);
  }
  Status status = STATUS_OK;
  for (; grid.first_tile < tiles && status == STATUS_OK; grid.first_tile += GRID_MOST) {
    const int64_t blocks = tiles - grid.first_tile < GRID_MOST ? tiles - grid.first_tile : GRID_MOST;
    PNN_LAUNCH(status, channels_last_kernel, blocks, THREADS, BYTES, stream, layer, grid);
  }
  return status;
}

}  // namespace pnn_cuda
