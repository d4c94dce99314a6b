/*
 * results.cc - runs a fixed list of calls and prints a hash of every result's bits, a line each.
 *
 * Compiled twice: cuda_results_host runs the kernels on the CPU in Hopper's arithmetic, cuda_results_device
 * (PNN_RESULTS_ON_DEVICE) on the GPU. On a GPU with that arithmetic both print the same lines. The first argument says
 * how often to repeat everything; lines that change between repetitions end the program with an error. With a second
 * one the calls that a CPU takes seconds for are left out. No test framework is needed.
 */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "pnn/pnn_cuda.h"

#if defined(PNN_RESULTS_ON_DEVICE)
#include <cuda_runtime_api.h>
#else
#include "cuda_on_host.h"
#endif

namespace {

[[noreturn]] void stop(const char *what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

/* Memory of the device; on the host, ordinary memory of exactly that size. */
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
#if defined(PNN_RESULTS_ON_DEVICE)
    if (cudaMalloc(&data_, bytes ? bytes : 1) != cudaSuccess) stop("cudaMalloc failed");
#else
    data_ = std::malloc(bytes ? bytes : 1);
#endif
  }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  ~Memory() {
#if defined(PNN_RESULTS_ON_DEVICE)
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }
  void put(const void *from) {
#if defined(PNN_RESULTS_ON_DEVICE)
    if (cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice) != cudaSuccess) stop("cudaMemcpy failed");
#else
    std::memcpy(data_, from, bytes_);
#endif
  }
  std::vector<unsigned char> get() const {
    std::vector<unsigned char> to(bytes_);
#if defined(PNN_RESULTS_ON_DEVICE)
    if (cudaMemcpy(to.data(), data_, bytes_, cudaMemcpyDeviceToHost) != cudaSuccess)
      stop("a kernel or cudaMemcpy failed");
#else
    std::memcpy(to.data(), data_, bytes_);
#endif
    return to;
  }
  void *data() const { return data_; }

 private:
  void *data_ = nullptr;
  size_t bytes_;
};

uint64_t next_random(uint64_t *state) { /* SplitMix64 */
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

size_t size_of(pnn_dtype type) { return type == PNN_FLOAT64 ? 8 : type == PNN_FLOAT32 ? 4 : 2; }

/* Random numbers in [-2, 2), written by their bits: a sign, an exponent of four, and all fraction bits. */
void fill(std::vector<unsigned char> *bytes, pnn_dtype type, uint64_t *state) {
  const int fraction = type == PNN_FLOAT64 ? 52 : type == PNN_FLOAT32 ? 23 : type == PNN_BFLOAT16 ? 7 : 10;
  const uint64_t bias = type == PNN_FLOAT64 ? 1023 : type == PNN_FLOAT16 ? 15 : 127, size = size_of(type);
  for (size_t i = 0; i < bytes->size(); i += size) {
    const uint64_t r = next_random(state);
    const uint64_t bits =
        ((r & 1) << (8 * size - 1)) | ((bias - (r >> 1 & 3)) << fraction) | (r >> 3 & ((uint64_t{1} << fraction) - 1));
    std::memcpy(bytes->data() + i, &bits, size);
  }
}

/* What a call is beside its types and sizes. */
enum { CONTIGUOUS = 0, CHANNELS_LAST = 1, NORM = 2, TF32 = 4, WGMMA = 8 };

struct Call {
  pnn_dtype input, weight;
  int64_t B, C, H, W, T, M, groups, stride;
  pnn_noise noise;
  pnn_activation activation;
  int how;
};

/* One tensor of a call, its memory and its name. */
struct Operand {
  std::string name;
  Memory memory;
  Operand(const std::string &name_, size_t bytes) : name(name_), memory(bytes) {}
};

class Runner {
 public:
  Runner(const Call &c, uint64_t seed) : c_(c), state_(seed) {
    pnn_params_init(&p_);
    const int64_t K = c.C * c.M, h = (c.H - 1) / c.stride + 1, w = (c.W - 1) / c.stride + 1;
    const pnn_dtype real = c.input == PNN_FLOAT64 ? PNN_FLOAT64 : PNN_FLOAT32;
    make(&p_.input, c.input, {c.B, c.C, c.H, c.W}, "input");
    make(&p_.weight, c.weight, {c.T, K / c.groups, 1, 1}, "weight");
    make(&p_.bias, c.weight, {c.T, 1, 1, 1}, "bias");
    make(&p_.grad_output, c.weight, {c.B, c.T, h, w}, "grad_output");
    if (c.noise == PNN_NOISE_TENSOR) make(&p_.mask, PNN_FLOAT32, {c.C, c.M, c.H, c.W}, "mask");
    inputs_ = operands_.size();
    make(&p_.output, c.weight, {c.B, c.T, h, w}, "output");
    make(&p_.grad_input, c.input, {c.B, c.C, c.H, c.W}, "grad_input");
    make(&p_.grad_weight, c.weight, {c.T, K / c.groups, 1, 1}, "grad_weight");
    make(&p_.grad_bias, c.weight, {c.T, 1, 1, 1}, "grad_bias");
    if (c.noise == PNN_NOISE_TENSOR) make(&p_.grad_mask, PNN_FLOAT32, {c.C, c.M, c.H, c.W}, "grad_mask");
    if (c.how & NORM) {
      make(&p_.mean, real, {K, 1, 1, 1}, "mean");
      make(&p_.variance, real, {K, 1, 1, 1}, "variance");
      make(&p_.grad_norm_weight, real, {K, 1, 1, 1}, "grad_norm_weight");
      make(&p_.grad_norm_bias, real, {K, 1, 1, 1}, "grad_norm_bias");
    }
    const int64_t seed_value = 0x5eed;
    seed_.put(&seed_value);
    p_.seed = static_cast<const int64_t *>(seed_.data());
    p_.noise = c.noise, p_.masks = c.M, p_.level = 0.25, p_.activation = c.activation, p_.groups = c.groups;
    p_.stride[0] = p_.stride[1] = c.stride, p_.norm = p_.norm_training = (c.how & NORM) != 0;
    p_.allow_tf32 = (c.how & TF32) != 0;
    p_.allow_wgmma = (c.how & WGMMA) != 0;
  }
  ~Runner() {
    for (Operand *o : operands_) delete o;
  }

  std::string run() {
    for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
      size_t bytes = 0;
      pnn_error error;
      if (pnn_cuda_workspace_size(&p_, pass, &bytes, &error) != PNN_OK) stop(error.message);
      Memory workspace(bytes);
      p_.workspace = workspace.data();
      p_.workspace_bytes = bytes;
      if ((pass == PNN_PASS_FORWARD ? pnn_cuda_forward : pnn_cuda_backward)(&p_, nullptr, &error) != PNN_OK)
        stop(error.message);
#if defined(PNN_RESULTS_ON_DEVICE)
      if (cudaDeviceSynchronize() != cudaSuccess) stop(cudaGetErrorString(cudaGetLastError()));
#endif
      p_.workspace = nullptr;
    }
    std::string text;
    for (size_t i = inputs_; i < operands_.size(); i++) {
      uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
      for (unsigned char byte : operands_[i]->memory.get()) hash = (hash ^ byte) * 0x100000001b3u;
      char line[64];
      std::snprintf(line, sizeof line, " %s %016llx", operands_[i]->name.c_str(),
                    static_cast<unsigned long long>(hash));
      text += line;
    }
    return text;
  }

 private:
  void make(pnn_tensor *t, pnn_dtype type, std::vector<int64_t> size, const char *name) {
    size_t count = 1;
    for (int d = 3; d >= 0; d--) {
      t->size[d] = size[static_cast<size_t>(d)];
      t->stride[d] = static_cast<int64_t>(count);
      count *= static_cast<size_t>(t->size[d]);
    }
    if (c_.how & CHANNELS_LAST) {
      const int64_t C = size[1], H = size[2], W = size[3];
      t->stride[1] = 1, t->stride[3] = C, t->stride[2] = C * W, t->stride[0] = C * H * W;
    }
    t->dtype = type;
    operands_.push_back(new Operand(name, count * size_of(type)));
    t->data = operands_.back()->memory.data();
    std::vector<unsigned char> bytes(count * size_of(type));
    fill(&bytes, type, &state_);
    operands_.back()->memory.put(bytes.data());
  }

  Call c_;
  uint64_t state_;
  pnn_params p_;
  std::vector<Operand *> operands_;
  size_t inputs_ = 0;
  Memory seed_{8};
};

const Call calls[] = {
    {PNN_FLOAT32, PNN_FLOAT32, 2, 16, 8, 8, 16, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM},
    {PNN_FLOAT64, PNN_FLOAT64, 2, 9, 5, 7, 6, 2, 3, 1, PNN_NOISE_NORMAL, PNN_ACTIVATION_TANH, CONTIGUOUS},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 72, 4, 16, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 32, 7, 7, 40, 4, 2, 1, PNN_NOISE_TENSOR, PNN_ACTIVATION_GELU, CHANNELS_LAST},
    {PNN_FLOAT16, PNN_FLOAT16, 3, 40, 5, 8, 24, 3, 1, 2, PNN_NOISE_WAVES, PNN_ACTIVATION_SILU, CONTIGUOUS},
    {PNN_FLOAT32, PNN_BFLOAT16, 2, 24, 4, 8, 16, 2, 1, 1, PNN_NOISE_TENSOR, PNN_ACTIVATION_SELU, CHANNELS_LAST | NORM},
    {PNN_FLOAT32, PNN_FLOAT16, 1, 3, 3, 5, 70, 1, 1, 1, PNN_NOISE_NONE, PNN_ACTIVATION_SIGMOID, CONTIGUOUS},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 72, 4, 16, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM | TF32},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 24, 7, 7, 40, 3, 1, 1, PNN_NOISE_TENSOR, PNN_ACTIVATION_GELU, CHANNELS_LAST | TF32},
    /* Pixels in runs of 4 bytes. */
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 32, 6, 14, 40, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    {PNN_FLOAT32, PNN_FLOAT32, 3, 32, 7, 7, 72, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM | TF32},
    /* Plain layers (is_plain in cuda/response.h), in small tiles and in large ones. */
    {PNN_BFLOAT16, PNN_BFLOAT16, 3, 32, 8, 8, 24, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 16, 64, 128, 72, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 32, 64, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CHANNELS_LAST},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 32, 16, 16, 40, 16, 2, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 16, 64, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 40, 8, 8, 136, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 80, 8, 8, 136, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CHANNELS_LAST},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 16, 64, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 8, 8, 12, 24, 4, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CHANNELS_LAST},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 16, 64, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, TF32},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 40, 8, 12, 136, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | TF32},
    {PNN_FLOAT32, PNN_BFLOAT16, 2, 16, 64, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CONTIGUOUS},
    /* Forward by Hopper's asynchronous products: its three tiles, both ways of x and y, every number of masks. */
    {PNN_BFLOAT16, PNN_BFLOAT16, 3, 80, 8, 8, 40, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 3, 80, 7, 7, 40, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CHANNELS_LAST | WGMMA},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 32, 16, 16, 136, 4, 2, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 24, 16, 16, 104, 8, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 8, 9, 11, 136, 64, 1, 2, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | WGMMA},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 16, 96, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 16, 64, 128, 136, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 16, 64, 128, 136, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | WGMMA},
    /* The input's gradient by them, in its larger tiles. */
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 144, 64, 128, 24, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 40, 64, 128, 24, 4, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 40, 96, 128, 24, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    /* By channels-last copies of x and g; dx by elements, by words. */
    {PNN_BFLOAT16, PNN_BFLOAT16, 3, 48, 7, 7, 40, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 32, 6, 14, 80, 4, 2, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_BFLOAT16, PNN_BFLOAT16, 3, 80, 9, 7, 72, 1, 1, 2, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, WGMMA},
    {PNN_FLOAT32, PNN_BFLOAT16, 3, 72, 7, 7, 24, 2, 1, 1, PNN_NOISE_TENSOR, PNN_ACTIVATION_SILU, CONTIGUOUS},
    /* Plain layers with normalisation, in training: the moments' three ways to read x, the products' ways. */
    {PNN_FLOAT32, PNN_FLOAT32, 3, 32, 7, 7, 24, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM},
    {PNN_FLOAT16, PNN_FLOAT16, 3, 16, 8, 8, 24, 4, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, CHANNELS_LAST | NORM},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 80, 8, 8, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | NORM | TF32},
    {PNN_BFLOAT16, PNN_BFLOAT16, 3, 80, 8, 8, 40, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM | WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 3, 24, 7, 7, 72, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM | WGMMA},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 8, 7, 7, 136, 16, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | NORM | WGMMA},
    {PNN_BFLOAT16, PNN_BFLOAT16, 2, 80, 64, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | NORM | WGMMA},
    {PNN_FLOAT16, PNN_FLOAT16, 2, 40, 64, 128, 136, 4, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM | WGMMA},
    /* TF32 by asynchronous products. */
    {PNN_FLOAT32, PNN_FLOAT32, 3, 80, 8, 8, 40, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 3, 40, 7, 7, 72, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 32, 9, 11, 136, 4, 2, 2, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 8, 8, 12, 104, 16, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 80, 64, 128, 136, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 16, 96, 128, 72, 8, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 80, 8, 8, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM | TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 40, 64, 128, 136, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | NORM | TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 80, 64, 128, 72, 1, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     NORM | TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 3, 24, 7, 7, 76, 2, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU, NORM | TF32 | WGMMA},
    {PNN_FLOAT32, PNN_FLOAT32, 2, 8, 8, 12, 44, 64, 1, 1, PNN_NOISE_UNIFORM, PNN_ACTIVATION_RELU,
     CHANNELS_LAST | NORM | TF32 | WGMMA},
};

}  // namespace

int main(int count, char **arguments) {
  const int repetitions = count > 1 ? std::atoi(arguments[1]) : 1;
#if defined(PNN_RESULTS_ON_DEVICE)
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) stop("no GPU");
#endif
  for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
    if (count > 2 && calls[i].H * calls[i].W > 4096) continue;
    std::string first;
    for (int r = 0; r < repetitions; r++) {
      const std::string now = Runner(calls[i], i + 1).run();
      if (r == 0) first = now;
      if (now != first) stop("the same call gave other bits in another run");
    }
    std::printf("call %zu%s\n", i, first.c_str());
  }
  return 0;
}
