/*
 * tiles.h - the tile sizes of each instruction set; a part of kernels.c. They change speed, never bits.
 */
#ifndef PNN_KERNELS_TILES_H
#define PNN_KERNELS_TILES_H

/* Tiles of `product`: rows x vectors of accumulators, beside the vectors of B and one broadcast of A. 32 registers hold
 * 6 x 4, which take 37 instructions for 24 multiply-adds where 8 x 2 take 29 for 16: a processor with two multiply-add
 * units of 16 lanes is bound by what it decodes. 16 registers hold 6 x 2.
 * Strips are the narrower tiles of products whose columns are outputs or maps, of which there may be few. */
#if defined(PNN_ISA_AVX512)
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define STRIP_ROWS 8
#define STRIP_VECTORS 2
#elif defined(PNN_ISA_NEON)
#define TILE_ROWS 8
#define TILE_VECTORS 2
#else
#define TILE_ROWS 6
#define TILE_VECTORS 2
#endif
#if !defined(STRIP_ROWS)
#define STRIP_ROWS TILE_ROWS
#define STRIP_VECTORS TILE_VECTORS
#endif
/* Tiles of STRIP_ROWS outputs whose gradient is packed side by side: with AVX-512 two cache lines of a pixel. */
#if defined(PNN_REAL_F32)
#define PACKED_TILES 4
#else
#define PACKED_TILES 2
#endif
#define TILE_COLUMNS (TILE_VECTORS * VR)
#define STRIP_COLUMNS (STRIP_VECTORS * VR)
#define LINE (64 / (int64_t)sizeof(real)) /* reals of a cache line */

/* Tiles of `dot`: rows x columns of sums in PNN_LANES lanes each, LANE_VECTORS registers, of which one is in work at a
 * time: 32 registers hold 4 x 4, 16 hold 4 x 2. */
#define LANE_VECTORS (PNN_LANES / VR)
#define DOT_ROWS 4
#if defined(PNN_ISA_AVX512) || defined(PNN_ISA_NEON)
#define DOT_COLUMNS 4
#else
#define DOT_COLUMNS 2
#endif

#endif
