// host.h - PyTorch's intra-op threads as libpnn's host.
#ifndef TORCH_PNN_HOST_H
#define TORCH_PNN_HOST_H

#include <pnn/pnn.h>

namespace torch_pnn {

// The threads that torch.get_num_threads() allows at this moment; the calling thread alone in a forked child, where the
// pool of the parent's OpenMP runtime is gone and a parallel region would wait for it for ever.
pnn_host current_host();

// The same for one pass: the calling thread alone where the pass is small.
pnn_host current_host(const pnn_params& params);

}  // namespace torch_pnn

#endif
