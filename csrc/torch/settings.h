// settings.h - what a user may set for the whole process, kept once: in torch_pnn_ops, where torch_pnn_cuda finds it
// too.
#ifndef TORCH_PNN_SETTINGS_H
#define TORCH_PNN_SETTINGS_H

// Whether float32 products on CUDA may be of operands rounded to TF32. From TORCH_PNN_ALLOW_TF32 in the environment
// until it is set; any thread may ask and set. Not PyTorch's setting of that name: the stable ABI cannot read it, and
// its default for convolutions is not ours.
extern "C" __attribute__((visibility("default"))) bool torch_pnn_tf32_allowed();
extern "C" __attribute__((visibility("default"))) void torch_pnn_allow_tf32(bool allowed);

// Whether Hopper's asynchronous products may be used, true until TORCH_PNN_ALLOW_WGMMA=0 or a caller says no.
extern "C" __attribute__((visibility("default"))) bool torch_pnn_wgmma_allowed();
extern "C" __attribute__((visibility("default"))) void torch_pnn_allow_wgmma(bool allowed);

#endif
