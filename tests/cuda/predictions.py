"""What an H100 is predicted to need for each pass: bytes, flops, instructions, wavefronts, and what bounds the time.

    python tests/cuda/predictions.py             prints the tables of docs/cuda.md
    python tests/cuda/predictions.py --write     writes them into docs/cuda.md

Measurements are compared with these numbers (gpu_check.py); one missed by more than 1.5x is to be explained. Each
kernel's time is the largest of five, since a GPU overlaps them: memory, L2 cache, tensor cores, issuing instructions
(FFMA among them), shared memory. A warp waits between its instructions, so how fast they are issued depends on how many
warps there are: that was measured (benchmarks/results/2026-11-26-h200.md), the rest is counted. The constants say where
they come from. Nothing here needs a GPU, PyTorch or CUDA.

Example:
    >>> p = predict((32, 64, 56, 64, 1), "bfloat16", "forward")
    >>> p.bytes, p.flops, p.bound
    (25698304, 822083584, 'instructions')
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Case = tuple[int, int, int, int, int]  # B, C, H = W, T, M

DTYPES = ("float32", "tf32", "bfloat16", "float16")
DIRECTIONS = ("forward", "input_gradient", "weight_gradient", "backward", "forward+backward")
BENCHMARK_CASES: tuple[Case, ...] = (
    (32, 64, 56, 64, 1),
    (32, 128, 28, 128, 1),
    (32, 256, 14, 256, 1),
    (32, 512, 7, 512, 1),
    (128, 64, 32, 64, 1),
    (128, 128, 16, 128, 1),
    (8, 64, 32, 64, 16),
    (4, 64, 32, 64, 64),
)
LARGE_CASES: tuple[Case, ...] = (
    (256, 64, 56, 64, 1),
    (256, 256, 28, 256, 1),
    (64, 256, 56, 256, 4),
    (32, 512, 28, 512, 4),
)
CASES = BENCHMARK_CASES + LARGE_CASES


@dataclass(frozen=True)
class Prediction:
    """One pass of one case. Times are in microseconds; `time_us` holds the launches too."""

    case: Case
    dtype: str
    direction: str
    layout: str
    norm: bool
    bytes: int
    flops: int
    memory_us: float
    l2_us: float
    product_us: float
    issue_us: float
    shared_us: float
    launches: int
    time_us: float
    bound: str

    @property
    def intensity(self) -> float:
        """Flops per byte of device memory."""
        return self.flops / self.bytes


# ---- an H100 (SXM); an H200 differs by its memory ----

DEVICE_BYTES = 3.3e12  # a second, from device memory
H200_DEVICE_BYTES = 4.3e12
CACHE_BYTES = 5.5e12  # a second, from the L2 cache
CACHE_SIZE = 30e6  # what a kernel leaves in the L2 cache for the next one, of its 50 MB
MULTIPROCESSORS, CLOCK = 132, 1.755e9
LAUNCH_US = 2.0  # from the end of one kernel of a CUDA graph to the start of the next one's work
# Flops a second, and the share of them that mma.sync (FFMA) is taken to reach.
FLOPS = {"float32": 67e12, "tf32": 495e12, "bfloat16": 990e12, "float16": 990e12}
REACHED = {"float32": 0.95, "tf32": 0.60, "bfloat16": 0.60, "float16": 0.60}
LIBRARY_REACHED = {"float32": 0.90, "tf32": 0.75, "bfloat16": 0.75, "float16": 0.75}  # cuBLAS and cuDNN
SIZE = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}
# Cycles that a warp waits for each in which it issues an instruction, from ncu's issued instructions a cycle on an H200
# (for example 0.48 with 4 warps to a scheduler, 0.35 with 2; FFMA 0.65 with 2): the shares add up to at most
# warps / (warps + WAITS). Element by element, for numbers that come from device memory one at a time.
WAITS = {"float32": 1.1, "tf32": 4.0, "bfloat16": 4.0, "float16": 4.0}
WAITS_BY_ELEMENTS = {"float32": 3.0, "tf32": 6.0, "bfloat16": 7.0, "float16": 7.0}
# Cycles from a block's start to its first product and from its last to the end of its stores: what other blocks do not
# hide of them, fitted to the same measurements.
FILL = 1500
# Blocks that are on a multiprocessor at a time (large, small tile); tests/cuda/kernels.txt has them for sm_90.
RESIDENT = {"float32": (1, 3), "tf32": (2, 4), "bfloat16": (2, 4), "float16": (2, 4)}
WAVEFRONTS_A_SECOND = MULTIPROCESSORS * CLOCK
# A thread's instructions, counted along the shortest way through the machine code for sm_90 that does the work, for the
# 256-value lattice from a seed, relu and contiguous tensors. Plain layers (cuda/response.h), (large, small tile):
# one step of depth, FFMA not counted: copies, the product, and a thread's share of the operand (16-bit types: sixteen
# maps of a pixel; float32: sixteen in every second step, of which this is the mean);
FORWARD_STEP = {"float32": (209.5, 194.5), "tf32": (299, 234), "bfloat16": (302, 272), "float16": (302, 272)}
WEIGHT_STEP = {"float32": (224, 208), "tf32": (328.5, 265.5), "bfloat16": (310, 275), "float16": (308, 275)}
# how many fewer with sixteen masks or more, where one number of x is read for all sixteen maps (below 0: more);
FEWER_LOADS = {"float32": -2, "tf32": -2, "bfloat16": 9, "float16": 9}
# the input gradient's step: copies and the product;
INPUT_STEP = {"float32": (118, 100), "tf32": (278, 194), "bfloat16": (111, 91), "float16": (111, 91)}
# what the weight gradient does for a pixel of a step, to look it up, and for an output's share of dbias;
LOOK_UP, TOTAL = 110, 3
# what the input gradient does for a map of a pixel once the product is there, and for each number that it stores: with
# one mask, and more with each further one.
INPUT_MAP = {"float32": 14.8, "tf32": 14.8, "bfloat16": 15.9, "float16": 15.9}
INPUT_STORE = {"float32": (4.0, 2.3), "tf32": (4.0, 2.3), "bfloat16": (2.6, 1.9), "float16": (2.6, 1.9)}
# Before and behind the steps: places, keys, bias, sums into shared memory, stores; what ncu counted beside the steps;
TILE, INPUT_TILE = (620, 441), (589, 465)
# Other layers: one step without the operand, what a thread makes of the operand in it; the last, element by element
# where no runs of 16 bytes can be had, is estimated.
ANY_STEP = {"float32": (264, 248), "tf32": (288, 236), "bfloat16": (233, 214), "float16": (233, 214)}
OPERAND_BY_ELEMENTS = {"float32": 380, "tf32": 400, "bfloat16": 680, "float16": 680}
ANY_INPUT_STEP, ANY_INPUT_MAP = (176, 160), 30
# Normalisation in plain layers: the moments of a map of a pixel; what centring adds to a response, and to an operand of
# sixteen by mma.sync; what the input gradient's epilogue has more, in training, for each map of a pixel.
MOMENTS, CENTRED, CENTRED_OPERAND, AFFINE = 26.0, 2.5, 60, 4.5
# Hopper's asynchronous products (cuda/*_wgmma.cu). The share of FLOPS that they are taken to reach, which is cuBLAS's;
WGMMA_REACHED = 0.75
# forward: outputs and pixels of a tile, blocks on a multiprocessor; a thread's instructions in a step of 64 maps of its
# two pixels, by outputs, with 1, 2, 4, 8 and 16 or more masks (of TF32 8 or more), and before and behind the steps;
WGMMA_TILES = ((256, 128, 1), (128, 64, 3), (64, 64, 4))
WGMMA_STEP = {
    "bfloat16": {256: (432, 384, 352, 340, 334), 128: (423, 379, 355, 342, 336), 64: (415, 363, 339, 326, 320)},
    "float16": {256: (467, 419, 387, 375, 369), 128: (458, 414, 390, 377, 371), 64: (450, 398, 374, 361, 355)},
    "tf32": {256: (524, 484, 462, 452), 128: (528, 486, 464, 454), 64: (520, 475, 450, 444)},
}
WGMMA_TILE = {256: 870, 128: 570, 64: 440}
# the input gradient: maps of a tile, warpgroups of a block, the latter in training or, of TF32, with channels-last
# gradients, too; a thread's instructions in a step of 64 outputs (contiguous, channels-last), and for a tile of its two
# pixels, by maps, with 1, 2, 4, 8 and 16 or more masks (of TF32 within 3 % of these);
WGMMA_INPUT_TILES = {4: ((128, 3), (64, 3)), 2: ((256, 2), (128, 3), (64, 4))}  # by an element's bytes
WGMMA_AFFINE_TILES = ((128, 2), (64, 3))
WGMMA_INPUT_STEP = {4: (202, 182), 2: (139, 84)}
WGMMA_INPUT_TILE = {
    256: (2170, 1818, 1646, 1582, 1626),
    128: (1170, 990, 914, 882, 904),
    64: (665, 582, 540, 526, 538),
}
# the weight gradient: outputs and maps of a tile, threads of a block, blocks on a multiprocessor; a thread's
# instructions for 64 pixels (of TF32 two steps), by outputs, the mean of contiguous and channels-last gradients; the
# sums of g are not among them.
WGMMA_WEIGHT_TILES = ((256, 128, 256, 1), (128, 128, 128, 2), (64, 64, 128, 4))
WGMMA_WEIGHT_STEP = {
    4: {256: (745, 701, 666, 625, 623), 128: (1142, 1055, 1010, 940, 928), 64: (654, 610, 594, 550, 547)},
    2: {256: (534, 481, 458, 437, 434), 128: (872, 755, 706, 661, 692), 64: (470, 418, 395, 375, 372)},
}  # by an element's bytes
# Warps are taken to wait as those of the other kernels do.


@dataclass
class Kernel:
    """One launch."""

    device_bytes: float  # from and to device memory
    cache_bytes: float  # from and to the L2 cache, device memory's included
    flops: float = 0
    instructions: float = 0  # of single threads, beside those that multiply
    wavefronts: float = 0
    blocks: int = MULTIPROCESSORS
    threads: int = 128
    resident: int = 1  # blocks on a multiprocessor at a time
    waits: float = 4.0
    reached: float | None = None  # of FLOPS, where it is not REACHED

    def turns(self) -> list[int]:
        """How many blocks the busiest multiprocessor has at a time, turn by turn; the last may leave others idle."""
        full, rest = divmod(self.blocks, MULTIPROCESSORS * self.resident)
        return [self.resident] * full + ([math.ceil(rest / MULTIPROCESSORS)] if rest else [])

    def times(self, dtype: str, device_bytes: float = DEVICE_BYTES) -> dict[str, float]:
        """Microseconds of each resource."""
        turns = self.turns()
        idle = sum(turns) * MULTIPROCESSORS / max(self.blocks, 1)
        issued = self.instructions + (self.flops / 2 if dtype == "float32" else 0)
        a_block = issued / 32 / 4 / max(self.blocks, 1)  # a scheduler's share
        cycles = sum(n * a_block * (1 + self.waits / (n * self.threads / 32 / 4)) for n in turns)
        cycles += FILL * len(turns) if issued else 0
        product = self.flops / (FLOPS[dtype] * (self.reached or REACHED[dtype])) * 1e6 * idle
        return {
            "memory": self.device_bytes / device_bytes * 1e6,
            "L2 cache": self.cache_bytes / CACHE_BYTES * 1e6,
            "tensor cores" if dtype != "float32" else "FFMA": product,
            "instructions": cycles / CLOCK * 1e6,
            "shared memory": self.wavefronts / WAVEFRONTS_A_SECOND * 1e6 * idle,
        }


@dataclass(frozen=True)
class Tiles:
    """The shape of a pass's tiles and how many there are; cuda/kernels.h chooses alike."""

    rows: int
    columns: int
    row_tiles: int
    column_tiles: int

    @property
    def blocks(self) -> int:
        return self.row_tiles * self.column_tiles

    @property
    def small(self) -> bool:
        return self.rows == 64

    @property
    def threads(self) -> int:
        return 128 if self.small else 256


def tiles(rows: int, columns: int, *, enough: int = 128) -> Tiles:
    """Large tiles where they still make `enough` blocks."""
    large = Tiles(128, 128, math.ceil(rows / 128), math.ceil(columns / 128))
    if rows > 64 and large.blocks >= enough:
        return large
    return Tiles(64, 64, math.ceil(rows / 64), math.ceil(columns / 64))


def step_wavefronts(dtype: str, tile: Tiles) -> float:
    """Wavefronts of shared memory that one block's step of 64 bytes of depth takes: both operands written, by cp.async
    or by threads, and read by each warp (tensor cores: each row and column of warps for itself; FFMA: eight by eight).
    """
    rows, columns = tile.rows, tile.columns
    written = (rows + columns) * 64 / 128 * 2
    if dtype == "float32":
        per_thread = (rows * columns / tile.threads / 8 + 8) * 4  # loads of 16 bytes; half the lanes share theirs
        return written + tile.threads * per_thread / 8 / 2
    warps_n = 4 if rows == 128 else 2
    read = (rows * warps_n + columns * 2) * 64 / 128
    return written + read


def by_elements(case: Case, dtype: str, layout: str) -> bool:
    """Whether pixels (or channels) do not lie in runs of 16 bytes."""
    _, channels, height, outputs, _ = case
    run = 16 // SIZE[dtype]
    pixels = height * height
    return bool(pixels % run) if layout == "contiguous" else bool(channels % run or outputs % run)


def is_copied(case: Case, dtype: str, layout: str) -> bool:
    """Whether x and g are read as channels-last copies instead, whose channels lie in such runs (cuda/api.cu)."""
    _, channels, _, outputs, _ = case
    run = 16 // SIZE[dtype]
    return by_elements(case, dtype, layout) and channels % run == 0 and outputs % run == 0


def copies(case: Case, dtype: str, layout: str, direction: str) -> list[Kernel]:
    """The launch that makes them: x's forward; both backward, where the weight gradient comes first."""
    batch, channels, height, outputs, _ = case
    rows = {"forward": channels, "weight_gradient": channels + outputs}.get(direction, 0)
    if not rows or not is_copied(case, dtype, layout):
        return []
    moved = 2.0 * rows * batch * height * height * SIZE[dtype]
    return [Kernel(moved, moved)]


def wgmma_kernels(case: Case, dtype: str, direction: str, layout: str, *, norm: bool = False) -> list[Kernel]:
    """A pass by Hopper's asynchronous products, V's copy first; none where the layer can't have them. With `norm` in
    training."""
    _, channels, height, outputs, masks = case
    enough = {"forward": outputs, "weight_gradient": outputs, "input_gradient": channels * masks}
    if dtype not in WGMMA_STEP or enough.get(direction, 0) <= 32 or channels * masks % 16:
        return []
    elements = by_elements(case, dtype, layout)
    if direction == "forward":
        return wgmma_forward(case, dtype, elements and height % 2 == 1, norm)
    copied = is_copied(case, dtype, layout)
    if elements and not copied:
        return []
    if direction == "weight_gradient":
        return [*copies(case, dtype, layout, direction), *wgmma_weight_gradient(case, dtype, norm)]
    read = "channels_last" if copied else layout
    return wgmma_input_gradient(case, dtype, read, norm) if masks <= 64 and outputs * SIZE[dtype] <= 3584 else []


def wgmma_forward(case: Case, dtype: str, singly: bool, norm: bool) -> list[Kernel]:
    """Forward; `singly`: x comes one number at a time."""
    batch, channels, height, outputs, masks = case
    size, maps, columns = SIZE[dtype], channels * masks, batch * height * height
    fitting = [
        (rows, pixels, resident)
        for rows, pixels, resident in WGMMA_TILES
        if outputs > rows // 2 and math.ceil(outputs / rows) * math.ceil(columns / pixels) >= 128
    ]
    rows, pixels, resident = [*fitting, WGMMA_TILES[-1]][0]
    if dtype == "tf32" and norm:
        resident = max(1, resident - 1)
    row_tiles, column_tiles = math.ceil(outputs / rows), math.ceil(columns / pixels)
    x, y, weight = channels * columns * size, outputs * columns * size, outputs * maps * size
    blocks, threads, steps = row_tiles * column_tiles, 2 * pixels, math.ceil(maps / 64)
    copied = row_tiles * rows * steps * 64 * size
    # A step's V is written by cp.async and read by each warpgroup.
    wavefronts = blocks * steps * 64 * rows * size / 128 * (1 + pixels / 64)
    steps_of = WGMMA_STEP[dtype][rows]
    step = steps_of[min(masks.bit_length(), len(steps_of)) - 1] + (48 // min(masks, 16) if singly else 0)
    step += 32 * CENTRED * norm
    main = Kernel(
        x + y,
        x * row_tiles + y + copied * column_tiles,
        2.0 * maps * columns * outputs,
        threads * blocks * (WGMMA_TILE[rows] + steps * step),
        wavefronts,
        blocks,
        threads,
        resident,
        WAITS_BY_ELEMENTS[dtype] if singly else WAITS[dtype],
        WGMMA_REACHED,
    )
    return [Kernel(weight, weight + copied), main]


def wgmma_input_gradient(case: Case, dtype: str, layout: str, norm: bool) -> list[Kernel]:
    """The input gradient: a block to a multiprocessor, V all the time in shared memory."""
    batch, channels, height, outputs, masks = case
    size, maps, columns = SIZE[dtype], channels * masks, batch * height * height
    steps, pixel_tiles = math.ceil(outputs / 64), math.ceil(columns / 64)
    fewer = norm or (dtype == "tf32" and layout == "channels_last")
    tiles_of = WGMMA_AFFINE_TILES if fewer else WGMMA_INPUT_TILES[size]
    fitting = [
        (tile, groups)
        for tile, groups in tiles_of
        if maps > tile // 2
        and tile * steps * 64 * size <= 224 * 1024
        and math.ceil(maps / tile) * math.ceil(pixel_tiles / groups) >= 128
    ]
    tile, groups = [*fitting, tiles_of[-1]][0]
    map_tiles = math.ceil(maps / tile)
    x, y, weight = channels * columns * size, outputs * columns * size, outputs * maps * size
    copied = map_tiles * tile * steps * 64 * size
    made = WGMMA_INPUT_TILE[tile][min(masks, 16).bit_length() - 1] + tile / 2 * AFFINE * norm
    step = WGMMA_INPUT_STEP[size][layout == "channels_last"]
    main = Kernel(
        y + 2 * x,
        y * map_tiles + 2 * x + copied * MULTIPROCESSORS / map_tiles,
        2.0 * maps * columns * outputs,
        128 * map_tiles * pixel_tiles * (made + steps * step),
        map_tiles * pixel_tiles * steps * 64 * tile * size / 128,
        MULTIPROCESSORS,
        128 * groups,
        1,
        WAITS[dtype],
        WGMMA_REACHED,
    )
    return [Kernel(weight, weight + copied), main]


def wgmma_weight_gradient(case: Case, dtype: str, norm: bool) -> list[Kernel]:
    """The weight gradient and what adds its pieces up."""
    batch, channels, height, outputs, masks = case
    size, maps, columns = SIZE[dtype], channels * masks, batch * height * height
    fitting = [
        tile
        for tile in WGMMA_WEIGHT_TILES
        if outputs > tile[0] // 2
        and math.ceil(outputs / tile[0]) * math.ceil(maps / tile[1]) * math.ceil(columns / 256) >= 128 * tile[3]
    ]
    rows, tile, threads, resident = [*fitting, WGMMA_WEIGHT_TILES[-1]][0]
    row_tiles, map_tiles = math.ceil(outputs / rows), math.ceil(maps / tile)
    wanted = max(1, min(math.ceil(columns / 256), MULTIPROCESSORS * resident // (row_tiles * map_tiles)))
    piece = max(64, math.ceil(math.ceil(columns / wanted) / 64) * 64)
    splits = math.ceil(columns / piece)
    x, y, weight = channels * columns * size, outputs * columns * size, outputs * maps * size
    parts, steps = splits * outputs * maps * 4, math.ceil(piece / 64) * splits * row_tiles * map_tiles
    main = Kernel(
        x + y + parts,
        x * row_tiles + y * map_tiles + parts,
        2.0 * maps * columns * outputs,
        threads * steps * WGMMA_WEIGHT_STEP[size][rows][min(masks, 16).bit_length() - 1]
        + steps * 64 * tile * CENTRED * norm
        + columns * outputs * TOTAL,
        steps * 64 * tile * size / 128 * (1 + threads / 128),
        row_tiles * map_tiles * splits,
        threads,
        resident,
        WAITS[dtype],
        WGMMA_REACHED,
    )
    return [main, Kernel((0 if parts < CACHE_SIZE else parts) + 2 * weight, parts + 2 * weight)]


def kernels(
    case: Case, dtype: str, direction: str, layout: str = "contiguous", *, norm: bool = False, wgmma: bool = True
) -> list[Kernel]:
    """The launches of a pass, in order (cuda/api.cu)."""
    parts = {
        "backward": ("weight_gradient", "input_gradient"),
        "forward+backward": ("forward", "weight_gradient", "input_gradient"),
    }
    if direction in parts:
        each = [kernels(case, dtype, part, layout, norm=norm, wgmma=wgmma) for part in parts[direction]]
        return [kernel for part in each for kernel in part]
    batch, channels, height, outputs, masks = case
    size, maps, columns = SIZE[dtype], channels * masks, batch * height * height
    x, y, weight = channels * columns * size, outputs * columns * size, outputs * maps * size
    small = [Kernel(2 * weight, 2 * weight)]  # one of those that handle channels, outputs or weights
    before, after = around(case, dtype, direction) if norm else ([], [])
    if wgmma and (found := wgmma_kernels(case, dtype, direction, layout, norm=norm)):
        return [*before, *found, *after]
    elements = by_elements(case, dtype, layout) and not is_copied(case, dtype, layout)
    copied = copies(case, dtype, layout, direction)
    if elements:
        make = OPERAND_BY_ELEMENTS[dtype]
        forward_step = weight_step = (ANY_STEP[dtype][0] + make, ANY_STEP[dtype][1] + make)
        input_step, input_map = ANY_INPUT_STEP, float(ANY_INPUT_MAP)
    else:
        fewer = FEWER_LOADS[dtype] if masks >= 16 else 0
        forward_step = (FORWARD_STEP[dtype][0] - fewer, FORWARD_STEP[dtype][1] - fewer)
        weight_step = (WEIGHT_STEP[dtype][0] - fewer, WEIGHT_STEP[dtype][1] - fewer)
        input_step, input_map = INPUT_STEP[dtype], INPUT_MAP[dtype]
        if norm:  # in float32 a thread makes its operand in every second step
            more = CENTRED_OPERAND if size == 2 else CENTRED_OPERAND / 2
            forward_step = (forward_step[0] + more, forward_step[1] + more)
            weight_step = (weight_step[0] + more, weight_step[1] + more)
            input_map += AFFINE
    weights = small if norm else []  # V with the scale in it
    depth = 64 // size
    flops = 2.0 * maps * columns * outputs
    waits = (WAITS_BY_ELEMENTS if elements else WAITS)[dtype]
    reads = depth / 32 / min(masks, 16)  # wavefronts that read x for one line of a step's operand
    if direction == "forward":
        shape = tiles(outputs, columns)
        steps = math.ceil(maps / depth) * shape.blocks
        main = Kernel(
            x + y + weight,
            x * shape.row_tiles + y + weight * shape.column_tiles,
            flops,
            shape.threads * (shape.blocks * TILE[shape.small] + steps * forward_step[shape.small]),
            steps * (step_wavefronts(dtype, shape) + shape.columns * reads) + outputs * columns * 4 * 2 / 128,
            shape.blocks,
            shape.threads,
            RESIDENT[dtype][shape.small],
            waits,
        )
        return [*before, *copied, *weights, main]
    if direction == "weight_gradient":
        large = outputs > 64 and maps > 64
        edge = 128 if large else 64
        row_tiles, column_tiles = math.ceil(outputs / edge), math.ceil(maps / edge)
        wanted = max(1, min(math.ceil(columns / 256), (264 if large else 528) // (row_tiles * column_tiles)))
        piece = max(64, math.ceil(math.ceil(columns / wanted) / 64) * 64)
        splits = max(1, math.ceil(columns / piece))
        shape = Tiles(edge, edge, row_tiles, column_tiles)
        parts = splits * outputs * maps * 4
        steps = math.ceil(piece / depth) * splits * shape.blocks
        main = Kernel(
            x + y + parts,
            x * row_tiles + y * column_tiles + parts,
            flops,
            shape.threads * (shape.blocks * splits * TILE[shape.small] + steps * weight_step[shape.small])
            + steps * depth * LOOK_UP
            + columns * outputs * TOTAL,
            steps * (step_wavefronts(dtype, shape) + shape.columns * reads),
            shape.blocks * splits,
            shape.threads,
            RESIDENT[dtype][shape.small],
            waits,
        )
        join = Kernel((0 if parts < CACHE_SIZE else parts) + 2 * weight, parts + 2 * weight)
        return [*before, *copied, main, join, *after]
    assert direction == "input_gradient", direction
    shape = tiles(maps, columns)
    steps = math.ceil(outputs / depth) * shape.blocks
    main = Kernel(
        y + 2 * x + weight,
        y * shape.row_tiles + 2 * x + weight * shape.column_tiles,
        flops,
        shape.threads * (shape.blocks * INPUT_TILE[shape.small] + steps * input_step[shape.small])
        + maps * columns * input_map
        + channels * columns * (INPUT_STORE[dtype][0] + INPUT_STORE[dtype][1] * (masks - 1)),
        steps * step_wavefronts(dtype, shape) + maps * columns * 4 * 5 / 128,
        shape.blocks,
        shape.threads,
        RESIDENT[dtype][shape.small],
        waits,
    )
    return [*weights, main]


def around(case: Case, dtype: str, direction: str) -> tuple[list[Kernel], list[Kernel]]:
    """What normalisation in training launches before and behind a pass's own kernels; V's copy is not among them.

    Forward: the moments, their joining, scales, start values. Backward: the scales; dV is stored when the pieces are
    joined, and normalisation's own gradients follow.
    """
    batch, channels, height, outputs, masks = case
    size, maps, columns = SIZE[dtype], channels * masks, batch * height * height
    x, weight = channels * columns * size, outputs * maps * size
    small = Kernel(2 * weight, 2 * weight)
    if direction == "weight_gradient":
        return [small], [small] * 2
    if direction != "forward":
        return [], []
    moments = Kernel(
        x,
        x * max(1, masks / 16),
        0,
        maps * columns * MOMENTS,
        maps * columns / 16,  # the joining of both passes' numbers: 64 of each thread's four pixels and sixteen maps
        math.ceil(maps / 16) * math.ceil(columns / 1024),
        256,
        2,
    )
    return [moments, small, small, small], []


def predict(
    case: Case,
    dtype: str,
    direction: str,
    layout: str = "contiguous",
    *,
    norm: bool = False,
    device: str = "H100",
    wgmma: bool = True,
) -> Prediction:
    """A pass's prediction.

    Args:
        case: (B, C, H = W, T, M).
        dtype: one of DTYPES; "tf32" is float32 with `torch_pnn.backends.cuda.allow_tf32`.
        direction: one of DIRECTIONS; the sum of its kernels.
        layout: "contiguous" or "channels_last".
        norm: with normalisation inside, in training.
        device: the name of the GPU; with "H200" in it, that one's memory.
        wgmma: with `torch_pnn.backends.cuda.allow_wgmma`, the default.

    Returns:
        The sums over the pass's kernels, launches included in `time_us`; `bound` is what bounds the longest kernel.
    """
    if dtype not in DTYPES or direction not in DIRECTIONS or layout not in ("contiguous", "channels_last"):
        raise ValueError(f"unknown dtype {dtype!r}, direction {direction!r} or layout {layout!r}")
    all_kernels = kernels(case, dtype, direction, layout, norm=norm, wgmma=wgmma)
    memory = H200_DEVICE_BYTES if "H200" in device else DEVICE_BYTES
    times = [kernel.times(dtype, memory) for kernel in all_kernels]
    longest = max(times, key=lambda t: max(t.values()))
    sums = [sum(list(t.values())[i] for t in times) for i in range(5)]
    busy = sum(max(t.values()) for t in times)
    launches = len(all_kernels)
    bound = max(longest, key=lambda name: longest[name])
    if bound == "instructions" and dtype == "float32":
        bound = "FFMA and other instructions"
    if LAUNCH_US * launches > busy:
        bound = "launches"
    return Prediction(
        case,
        dtype,
        direction,
        layout,
        norm,
        round(sum(k.device_bytes for k in all_kernels)),
        round(sum(k.flops for k in all_kernels)),
        *sums,
        launches,
        busy + LAUNCH_US * launches,
        bound,
    )


# ---- what it is compared with ----


def copy_us(case: Case, dtype: str) -> float:
    """A copy of x to y: reads x, writes y."""
    batch, channels, height, outputs, _ = case
    return batch * height * height * (channels + outputs) * SIZE[dtype] / DEVICE_BYTES * 1e6 + LAUNCH_US


def library_us(case: Case, dtype: str) -> float:
    """cuBLAS's product of the weight with response maps that are there already."""
    batch, channels, height, outputs, masks = case
    maps, columns, size = channels * masks, batch * height * height, SIZE[dtype]
    return product_us(dtype, maps, columns, outputs, (maps + outputs) * columns * size) + LAUNCH_US


def product_us(dtype: str, maps: int, columns: int, outputs: int, moved: float) -> float:
    flops = 2.0 * maps * columns * outputs
    return max(flops / (FLOPS[dtype] * LIBRARY_REACHED[dtype]), moved / DEVICE_BYTES) * 1e6


def compiled_us(case: Case, dtype: str, direction: str) -> float:
    """torch.compile's time with an ideal schedule: one pointwise kernel each for perturbing and for its derivative, the
    response maps stored between them and cuDNN's 1x1 convolutions, at the library's rate; what fits stays in the L2
    cache from one kernel to the next."""
    batch, channels, height, outputs, masks = case
    maps, columns, size = channels * masks, batch * height * height, SIZE[dtype]
    x, y, a = channels * columns * size, outputs * columns * size, maps * columns * size
    mask = maps * height * height * 4

    def moved(again: Iterable[float], fresh: float) -> float:
        """Bytes of device memory that would take as long: those that another kernel has just touched cost less."""
        return fresh + sum(b * DEVICE_BYTES / CACHE_BYTES if b < CACHE_SIZE else b for b in again)

    def kernel(again: Iterable[float], fresh: float) -> float:
        return moved(again, fresh) / DEVICE_BYTES * 1e6 + LAUNCH_US

    def product(again: Iterable[float], fresh: float) -> float:
        return product_us(dtype, maps, columns, outputs, moved(again, fresh)) + LAUNCH_US

    forward = kernel([], x + mask + a) + product([a], y)
    weight_gradient = product([], y + a)
    input_gradient = product([y], a) + kernel([a, a], x)
    return {
        "forward": forward,
        "input_gradient": input_gradient,
        "weight_gradient": weight_gradient,
        "backward": weight_gradient + input_gradient,
        "forward+backward": forward + weight_gradient + input_gradient,
    }[direction]


COPY, PRODUCT, WGMMA_PRODUCT = "1.15 x a copy", "0.55 of cuBLAS's rate", "0.75 of cuBLAS's rate"
"""The names of forward's targets."""


@dataclass(frozen=True)
class Target:
    """What a time should be at most, in microseconds, and what was predicted."""

    name: str
    limit_us: float
    predicted_us: float

    @property
    def met(self) -> bool:
        return self.predicted_us <= self.limit_us


def targets(case: Case, dtype: str, layout: str = "contiguous", *, wgmma: bool = True) -> list[Target]:
    """The project's targets for a case: forward by what would bound it at best, and forward with backward."""
    batch, channels, height, outputs, masks = case
    flops = 2.0 * channels * masks * batch * height * height * outputs
    predicted = predict(case, dtype, "forward", layout, wgmma=wgmma).time_us
    if flops / (FLOPS[dtype] * REACHED[dtype]) * 1e6 + LAUNCH_US <= copy_us(case, dtype):
        forward = Target(COPY, 1.15 * copy_us(case, dtype), predicted)
    elif wgmma and wgmma_kernels(case, dtype, "forward", layout):
        forward = Target(WGMMA_PRODUCT, library_us(case, dtype) / 0.75, predicted)
    else:
        forward = Target(PRODUCT, library_us(case, dtype) / 0.55, predicted)
    both = predict(case, dtype, "forward+backward", layout, wgmma=wgmma).time_us
    return [forward, Target("0.7 x torch.compile", 0.7 * compiled_us(case, dtype, "forward+backward"), both)]


# ---- the page ----

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"
BEGIN = "<!-- written by tests/cuda/predictions.py --write -->\n"
END = "<!-- end of what predictions.py writes -->\n"


def row(*cells: object) -> str:
    return "| " + " | ".join(f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells) + " |\n"


def verdict(target: Target) -> str:
    return f"{target.limit_us:.1f} ({target.name}): {'met' if target.met else '**missed**'}"


def page() -> str:
    """The tables, in Markdown."""
    text = ""
    for dtype, wgmma in (("bfloat16", True), ("bfloat16", False), ("tf32", True), ("float32", True)):
        name = "float32 with `allow_tf32`" if dtype == "tf32" else dtype + " without `allow_wgmma`" * (not wgmma)
        text += f"\n{name}, forward (B, C, H=W, T, M; times in µs, contiguous, masks from the seed):\n\n"
        text += row("case", "MB", "GFLOP", "flop/byte", "memory", "L2", "product", "instructions", "shared memory")[:-1]
        text += row(" **predicted**", "bound by", "target").removeprefix("|")
        text += row(*["---"] * 12)
        for case in CASES:
            p = predict(case, dtype, "forward", wgmma=wgmma)
            text += row(
                ",".join(map(str, case)),
                p.bytes / 1e6,
                p.flops / 1e9,
                round(p.intensity),
                p.memory_us,
                p.l2_us,
                p.product_us,
                p.issue_us,
                p.shared_us,
                f"**{p.time_us:.1f}**",
                p.bound,
                verdict(targets(case, dtype, wgmma=wgmma)[0]),
            )
        text += f"\n{name}, the other passes (bytes in MB; normalised: with normalisation, in training):\n\n"
        text += row(
            "case",
            "input gradient: MB",
            "µs",
            "bound by",
            "weight gradient: MB",
            "µs",
            "bound by",
            "forward+backward",
            "target",
            "normalised: forward",
            "forward+backward",
        )
        text += row(*["---"] * 11)
        for case in CASES:
            inputs, weights, both = (
                predict(case, dtype, direction, wgmma=wgmma)
                for direction in ("input_gradient", "weight_gradient", "forward+backward")
            )
            text += row(
                ",".join(map(str, case)),
                inputs.bytes / 1e6,
                inputs.time_us,
                inputs.bound,
                weights.bytes / 1e6,
                weights.time_us,
                weights.bound,
                f"**{both.time_us:.1f}**",
                verdict(targets(case, dtype, wgmma=wgmma)[1]),
                *(predict(case, dtype, d, norm=True, wgmma=wgmma).time_us for d in ("forward", "forward+backward")),
            )
    return text + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Prints what an H100 is predicted to need.")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/cuda.md")
    if not parser.parse_args().write:
        print(page(), end="")
        return 0
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + page() + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
