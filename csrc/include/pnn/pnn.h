/*
 * pnn.h - the perturbation layer of Perturbative Neural Networks, in C.
 *
 * The layer (Juefei-Xu, Boddeti, Savvides, CVPR 2018) stands where a convolution stood. It adds fixed masks N to
 * its input, applies an activation and mixes the results with a learnable 1x1 weight V:
 *
 *     k = c*M + m                                        0 <= c < C, 0 <= m < M, k < K = C*M
 *     u[b,k,p] = x[b,c,p] + fl(level * N[c,m,p])         p: a pixel of the input
 *     a[b,k,p] = activation(u[b,k,p])
 *     y[b,t,q] = bias[t] + sum over k of V[t,k] * a[b,k,s(q)]     s(i,j) = (i*stride_h, j*stride_w)
 *
 * With normalisation inside, a is replaced by gamma * (a - mean) / sqrt(variance + eps) + beta, per map k.
 * With groups, t and k pair only inside a group, and V's column is k - group * (C/groups) * M.
 * The M times larger array `a` is never stored, neither forward nor backward.
 *
 * How to call it: fill a pnn_params, ask the pass for its workspace, give it that much memory, run it:
 *
 *     pnn_params p;
 *     pnn_params_init(&p);
 *     p.input  = ...; p.weight = ...; p.output = ...; p.noise = PNN_NOISE_UNIFORM; p.seed = &seed; p.level = 0.1;
 *     size_t bytes;
 *     pnn_error e;
 *     pnn_status s = pnn_workspace_size(&p, PNN_PASS_FORWARD, pnn_default_host(), &bytes, &e);
 *     if (s == PNN_OK) { p.workspace = malloc(bytes); p.workspace_bytes = bytes; }
 *     if (s == PNN_OK) s = pnn_forward(&p, pnn_default_host(), &e);
 *     if (s != PNN_OK) fprintf(stderr, "%s\n", e.message);
 *
 * What holds for every function here:
 *   - No global state that a caller can see, no allocation, no abort, exit or print. Any number of threads may call
 *     at once, also after a fork.
 *   - Everything is checked before anything is written: after a status other than PNN_OK, no output was touched.
 *   - Sizes and strides count elements, never bytes. A tensor whose `data` is NULL is absent; one that has no
 *     elements needs data all the same (any non-null pointer).
 *   - Inputs may have any strides, zero and negative too. An output must not overlap itself, an input, another
 *     output or the workspace.
 *   - float32, bfloat16 and float16 compute in float32, float64 in float64. The result has the same bits for every
 *     number of threads, in every run, and (forward, unless it takes the moments of the batch) for every split of
 *     the batch; in float32, float64 and float16, and in bfloat16 where `exact` is set, also on every instruction set.
 *     The floating-point environment of the caller (rounding, flush to zero) neither matters nor changes.
 *   - NaN and infinity come out where the same formula in float64 has them.
 */
#ifndef PNN_PNN_H
#define PNN_PNN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PNN_VERSION_MAJOR 0
#define PNN_VERSION_MINOR 1
#define PNN_VERSION_PATCH 0

#if defined(_WIN32)
#define PNN_API
#else
#define PNN_API __attribute__((visibility("default")))
#endif

/* Values are pinned: a new status takes a new number. */
typedef enum pnn_status {
  PNN_OK = 0,
  PNN_ERROR_NULL = 1,        /* a pointer that must be given is NULL */
  PNN_ERROR_VERSION = 2,     /* struct_size is not this header's: compiled against another version */
  PNN_ERROR_SHAPE = 3,       /* sizes do not fit together, or are negative */
  PNN_ERROR_DTYPE = 4,       /* element types do not fit together */
  PNN_ERROR_VALUE = 5,       /* an option is out of its range */
  PNN_ERROR_OVERFLOW = 6,    /* sizes or strides exceed what can be addressed */
  PNN_ERROR_ALIAS = 7,       /* an output overlaps itself, an input, another output or the workspace */
  PNN_ERROR_WORKSPACE = 8,   /* the workspace is too small */
  PNN_ERROR_UNSUPPORTED = 9, /* valid, but not available in this build */
  PNN_ERROR_DEVICE = 10      /* the CUDA runtime reported an error (CUDA entry points only) */
} pnn_status;

typedef enum pnn_dtype { PNN_FLOAT32 = 0, PNN_FLOAT64 = 1, PNN_BFLOAT16 = 2, PNN_FLOAT16 = 3 } pnn_dtype;

/* Derivatives select as PyTorch does: relu'(0) = 0, hardtanh'(+-1) = 0, leaky_relu'(0) = 0.01; at NaN relu' and
 * hardtanh' are 1 and leaky_relu' is 0.01. */
typedef enum pnn_activation {
  PNN_ACTIVATION_IDENTITY = 0,
  PNN_ACTIVATION_RELU = 1,
  PNN_ACTIVATION_LEAKY_RELU = 2, /* negative slope 0.01 */
  PNN_ACTIVATION_ELU = 3,        /* alpha 1 */
  PNN_ACTIVATION_SELU = 4,
  PNN_ACTIVATION_GELU = 5, /* the exact one, by erf */
  PNN_ACTIVATION_SILU = 6,
  PNN_ACTIVATION_TANH = 7,
  PNN_ACTIVATION_SIGMOID = 8,
  PNN_ACTIVATION_HARDTANH = 9, /* clamps to [-1, 1] */
  PNN_ACTIVATION_COUNT = 10
} pnn_activation;

/* Where the masks come from. The kinds after TENSOR are recipes: each value is computed from the seed and its own
 * coordinates by Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
 * so a mask costs no memory, exists at every image size and is the same everywhere. docs/masks.md has the formulas. */
typedef enum pnn_noise {
  PNN_NOISE_NONE = 0,    /* u = x: the control without perturbation */
  PNN_NOISE_TENSOR = 1,  /* `mask` holds the values */
  PNN_NOISE_UNIFORM = 2, /* 256 values (2u - 255)/256 in (-1, 1): mean 0, variance 1/3 */
  PNN_NOISE_NORMAL = 3,  /* sums of eight bytes: mean 0, standard deviation 1, |N| < 4.89 */
  PNN_NOISE_WAVES = 4,   /* the 256 values arranged as a triangle wave per map, wavelengths 4 to 64 pixels */
  PNN_NOISE_COUNT = 5
} pnn_noise;

/* A strided view. A tensor of fewer dimensions than four has 1 in the sizes behind its own. */
typedef struct pnn_tensor {
  void *data; /* inputs are not written */
  pnn_dtype dtype;
  int64_t size[4];
  int64_t stride[4]; /* in elements; never read where the size is 0 or 1 */
} pnn_tensor;

/* One struct for every pass; each pass reads its own part and leaves the rest alone.
 * Shapes: B batch, C channels, HxW input, T output channels, M masks per channel, K = C*M,
 * H' = floor((H-1)/stride_h) + 1 (0 for H = 0), W' alike.
 * Types: X is input's. D is weight's: X, or bfloat16/float16 beside a float32 input. S, for normalisation, is float32
 * (float64 where X is float64). A mask is float32 or X. */
typedef struct pnn_params {
  size_t struct_size; /* set by pnn_params_init */

  pnn_tensor input;  /* [B, C, H, W]        X */
  pnn_tensor weight; /* [T, (C/groups)*M]   D */
  pnn_tensor bias;   /* [T]                 D, optional */

  pnn_noise noise;
  int32_t shared_masks; /* recipes: not 0 = the same M masks for every channel (m takes the place of k) */
  int64_t masks;        /* M; with a mask tensor it must be mask.size[1] */
  pnn_tensor mask;      /* [C or 1, M, H, W]   float32 or X; for PNN_NOISE_TENSOR */
  const int64_t *seed;  /* one value, two's complement of the 64-bit seed; for the recipes. Device memory on CUDA */
  double level;         /* finite; every mask value is multiplied by it */
  pnn_activation activation;
  /* bfloat16 only. Not 0 = by float32 chains, with the same bits on every instruction set; 0 = by the processor's
   * bfloat16 dot products where it has them: faster, rounded otherwise, denormals as 0. */
  int32_t exact;
  /* float32 on CUDA only. 1 = its products may be the tensor cores', of operands rounded to TF32 (11 bits); 0 = as
   * accurate as float32. Every other call checks it and leaves it alone. */
  int32_t allow_tf32;
  /* bfloat16, float16 and, with allow_tf32, float32 on CUDA devices of compute capability 9.0 only. 1, as
   * pnn_params_init sets it = where the layer allows it, the products may be the asynchronous ones of that capability
   * (wgmma), in 16-bit types about twice as fast; 0 = never. Exact sums (of TF32: of operands that fit 11 bits) have
   * the same bits, others are rounded otherwise. Every other call checks it and leaves it alone. */
  int32_t allow_wgmma;
  int64_t stride[2]; /* rows, columns; >= 1 */
  int64_t groups;    /* divides C and T */

  /* Normalisation between the activation and the 1x1 product, over the computed pixels of the batch. */
  int32_t norm;           /* not 0 = normalise */
  int32_t norm_training;  /* not 0 = with the moments of this batch; 0 = with `mean` and `variance` as given */
  double norm_eps;        /* >= 0, finite */
  pnn_tensor norm_weight; /* [K] S, gamma; absent = 1 */
  pnn_tensor norm_bias;   /* [K] S, beta; absent = 0 */
  pnn_tensor mean;        /* [K] S; forward in training writes it, every other pass reads it */
  pnn_tensor variance;    /* [K] S; biased (divided by n); likewise */

  pnn_tensor output;      /* [B, T, H', W']   D; written by the forward pass */
  pnn_tensor grad_output; /* [B, T, H', W']   D; read by the backward pass */

  /* Written by the backward pass where given. */
  pnn_tensor grad_input;       /* as input */
  pnn_tensor grad_weight;      /* as weight */
  pnn_tensor grad_bias;        /* [T] D */
  pnn_tensor grad_mask;        /* as mask; PNN_NOISE_TENSOR only */
  pnn_tensor grad_norm_weight; /* [K] S */
  pnn_tensor grad_norm_bias;   /* [K] S */

  void *workspace; /* any alignment; contents are lost */
  size_t workspace_bytes;
} pnn_params;

typedef enum pnn_pass { PNN_PASS_FORWARD = 0, PNN_PASS_BACKWARD = 1 } pnn_pass;

/* The caller's threads. parallel_for(context, count, task, argument) calls task(argument, i) once for each
 * 0 <= i < count, in any order, on any threads, and returns when all have returned; `threads` says how many of them
 * may run at once (>= 1; it sizes the workspace, results do not depend on it). A NULL host means the calling thread. */
typedef struct pnn_host {
  int32_t threads;
  void (*parallel_for)(void *context, int64_t count, void (*task)(void *argument, int64_t index), void *argument);
  void *context;
} pnn_host;

/* What went wrong, in a sentence that names the argument, what it was and what it should be. */
typedef struct pnn_error {
  pnn_status status;
  char message[512]; /* empty after PNN_OK */
} pnn_error;

/* "0.1.0" */
PNN_API const char *pnn_version(void);

/* The name of a status, for example "PNN_ERROR_SHAPE"; "unknown status" for any other number. Never NULL. */
PNN_API const char *pnn_status_string(pnn_status status);

/* The instruction set whose kernels run here: "avx512", "avx2", "neon" or "portable". The environment variable
 * PNN_MAX_ISA, read at the first call, caps it by one of these names; an unknown name or one this processor lacks
 * changes nothing. */
PNN_API const char *pnn_isa_name(void);

/* Blocks are sized for the second-level cache of a core as the system reports it, up to 512 KiB; the environment
 * variable PNN_L2_BYTES, read at the first call, says another size (a number of bytes; anything else changes nothing).
 * Speed and the workspace's size depend on it, results never. */

/* Threads of this library's own: OpenMP where it was built with it, else NULL (the calling thread). */
PNN_API const pnn_host *pnn_default_host(void);

/* Zeroes everything and sets struct_size, masks = 1, level = 1, stride = 1, groups = 1, activation = relu,
 * norm_eps = 1e-5. NULL is ignored. */
PNN_API void pnn_params_init(pnn_params *params);

/* Bytes of workspace that the pass needs for these params on this host, in *bytes (0 on failure); with fewer threads it
 * may need more. The tensors' data pointers are not read, but which of them are NULL matters: ask with the same outputs
 * present. `error` may be NULL here and below. Checks everything that the pass checks, but for the workspace. */
PNN_API pnn_status pnn_workspace_size(const pnn_params *params, pnn_pass pass, const pnn_host *host, size_t *bytes,
                                      pnn_error *error);

/* Writes output, and with norm_training also mean and variance (then B*H'*W' must not be 1; where it is 0 they become
 * 0 and 1). */
PNN_API pnn_status pnn_forward(const pnn_params *params, const pnn_host *host, pnn_error *error);

/* Writes those of grad_input, grad_weight, grad_bias, grad_mask, grad_norm_weight and grad_norm_bias that are given.
 * Reads grad_output, input, weight, the mask and, with norm, norm_weight, norm_bias, mean and variance: the ones that
 * the forward pass wrote or was given. Neither output nor bias is read. */
PNN_API pnn_status pnn_backward(const pnn_params *params, const pnn_host *host, pnn_error *error);

/* Writes a recipe's masks out: `mask` is [channels or 1, M, H, W] of any type (values are rounded once, which changes
 * none of uniform and waves), strided at will. size[0] must be 1 where shared_masks is not 0. noise is UNIFORM, NORMAL
 * or WAVES. The level is not applied. */
PNN_API pnn_status pnn_mask_fill(const pnn_tensor *mask, pnn_noise noise, int32_t shared_masks, const int64_t *seed,
                                 const pnn_host *host, pnn_error *error);

#ifdef __cplusplus
}
#endif

#endif
