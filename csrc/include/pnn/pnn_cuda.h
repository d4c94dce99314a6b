/*
 * pnn_cuda.h - the perturbation layer on a CUDA device: the passes of pnn.h on the caller's stream.
 *
 * The params are those of pnn.h, filled alike; what differs:
 *   - Every `data` pointer, `seed` and `workspace` is device memory of the current device. Nothing reads it on the
 * host.
 *   - The functions enqueue kernels on `stream` and return: they do not wait, allocate or copy to the host, and may be
 *     captured into a CUDA graph. Outputs and workspace must live until the stream has passed them.
 *   - A status other than PNN_OK from the checks means that nothing was enqueued; PNN_ERROR_DEVICE means that the CUDA
 *     runtime refused a launch (its words are in the message) and that outputs may be partly written.
 *   - Results have the same bits in every run and, forward without the batch's moments, for every split of the batch,
 * on one kind of GPU. float32 and float64 products are chains of fused multiply-adds in ascending order, as on the CPU;
 *     bfloat16 and float16 products are the tensor cores', which keep 24 or 25 bits of each partial sum.
 *   - Where params.allow_tf32 is 1, float32's products are the tensor cores' too: the weight, the response maps (less
 *     their mean) and grad_output are rounded to TF32 (8 bits of exponent, 11 of fraction, to nearest, ties away from
 *     zero) as they enter a product; sums, moments, masks, activations and results stay float32. Each term of a sum is
 *     then off by at most 2^-10 of itself, and a number from 0x1.ffep127 on counts as infinite. It is 0 in a
 *     fresh pnn_params, and PyTorch's own settings of that name are not read here.
 *
 * Devices of compute capability 8.0 or newer.
 */
#ifndef PNN_PNN_CUDA_H
#define PNN_PNN_CUDA_H

#include "pnn/pnn.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cudaStream_t, without CUDA's headers. NULL is the default stream. */
typedef struct CUstream_st *pnn_cuda_stream;

/* As pnn_workspace_size. The answer depends on the params alone, never on the device. */
PNN_API pnn_status pnn_cuda_workspace_size(const pnn_params *params, pnn_pass pass, size_t *bytes, pnn_error *error);

/* As pnn_forward. */
PNN_API pnn_status pnn_cuda_forward(const pnn_params *params, pnn_cuda_stream stream, pnn_error *error);

/* As pnn_backward. */
PNN_API pnn_status pnn_cuda_backward(const pnn_params *params, pnn_cuda_stream stream, pnn_error *error);

/* As pnn_mask_fill. */
PNN_API pnn_status pnn_cuda_mask_fill(const pnn_tensor *mask, pnn_noise noise, int32_t shared_masks,
                                      const int64_t *seed, pnn_cuda_stream stream, pnn_error *error);

/* The compute capabilities that this build holds machine code for, for example "sm_80_86_89_90_100_120"; a device
 * newer than the newest of them runs its PTX. */
PNN_API const char *pnn_cuda_architectures(void);

#ifdef __cplusplus
}
#endif

#endif
