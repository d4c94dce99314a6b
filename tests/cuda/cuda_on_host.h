/*
 * cuda_on_host.h - runs a CUDA kernel's own source on the CPU, one fiber per CUDA thread. For tests only.
 *
 * The same .cu file compiles with nvcc for the device and with a C++ compiler for this header. A block's threads are
 * fibers of one OS thread; a fiber runs until it waits at a barrier, so a missing barrier shows as a wrong result under
 * some order of the fibers, and every order must give the same bits:
 *
 *   ROUND_ROBIN, REVERSE, SHUFFLED   all threads advance from barrier to barrier, in that order
 *   GREEDY                           one warp runs ahead of all others as far as the barriers let it
 *
 * cp.async copies land at once (eager) or not before the wait that demands them (lazy), and shared memory starts as
 * NaN and -1, so a missing wait reads poison. A barrier that some threads do not reach is reported, as are deadlocks.
 * Reads and writes outside of an allocation are the address sanitizer's to find: it is told of every switch.
 *
 * mma.sync follows the arithmetic that was measured on hardware (arXiv 2511.10909, 2512.07004): products are exact,
 * aligned to the largest exponent, truncated to F fractional bits, summed exactly and rounded toward zero: F = 25 in
 * one step on Hopper, F = 24 in two steps of half the depth on Ampere.
 *
 * wgmma's products run beside the threads: they read registers and shared memory, and write their sums, when they are
 * enqueued (early) or not before the wait that demands them (late). In between the sums are NaN and may not be written,
 * nor may the operands; registers must have been fenced since they were written, and shared memory handed over from the
 * threads' and cp.async's writes to the asynchronous proxy that products read it by (fence.proxy.async). What breaks
 * these rules ends the program with a message, or reads other bits. B's matrix descriptor is taken apart as the PTX
 * manual has it, without swizzling; the arithmetic is mma.sync's.
 *
 * Shared-memory wavefronts are counted on request: 32 banks of 4 bytes; an access of 4 bytes a lane goes as one group
 * of 32 lanes, of 8 as two of 16, of 16 as four of 8, and ldmatrix as one group for each matrix. Accesses are paired up
 * by their number since the last barrier, so the count is meant for code that the lanes of a warp run together.
 */
#ifndef PNN_CUDA_ON_HOST_H
#define PNN_CUDA_ON_HOST_H

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define PNN_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PNN_HOST_ASAN 1
#endif
#endif
#if defined(PNN_HOST_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void **fake_stack, const void *bottom, size_t size);
void __sanitizer_finish_switch_fiber(void *fake_stack, const void **bottom, size_t *size);
void __asan_unpoison_memory_region(const volatile void *address, size_t size);
}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_host {

enum class Order { ROUND_ROBIN, REVERSE, SHUFFLED, GREEDY };
enum class TensorCore { AMPERE, HOPPER };

struct Options {
  Order order = Order::ROUND_ROBIN;
  bool lazy_copies = true;
  unsigned seed = 1; /* of SHUFFLED's order and of GREEDY's leading warp */
  bool late_products = true;
  TensorCore tensor_core = TensorCore::HOPPER;
  bool count_wavefronts = false;
  int64_t wanted_blocks = 128;   /* of larger tiles, for them to be chosen */
  int64_t multiprocessors = 132; /* that sums are cut into pieces for */
};
inline thread_local Options options;

/* Wavefronts by kind of access: as they happened, and as few as the bytes need. */
enum Access { LOAD, STORE, COPY, MATRIX, ACCESS_KINDS };
struct Wavefronts {
  int64_t actual[ACCESS_KINDS] = {}, ideal[ACCESS_KINDS] = {};
};
inline thread_local Wavefronts wavefronts;
inline thread_local int64_t launches = 0;
/* wgmma's, a thread's each, and the columns of the last one. */
inline thread_local int64_t products = 0;
inline thread_local int product_columns = 0;

[[noreturn]] inline void fail(const char *message) {
  std::fprintf(stderr, "cuda_on_host: %s\n", message);
  std::abort();
}

/* ---- fibers ---- */

constexpr size_t STACK_BYTES = 128 * 1024;
enum class State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Copy {
  void *to;
  const void *from;
  int bytes, zeros;
};

/* One of wgmma's, as a lane sees it: rows lane / 4 and lane / 4 + 8 of its warp's sixteen. */
struct Product {
  float *sums;
  int count;
  const uint32_t *operands[4]; /* of the lane's quad */
  uint32_t values[4][4];       /* of these, when the product was enqueued */
  uint64_t b;                  /* matrix descriptor */
  void (*add)(const Product &, float *sums);
};

/* The sums of products that run, and how many do. */
struct Sums {
  float *at;
  int pending;
  std::vector<float> late; /* what late products have added up so far */
};

/* Registers as a wgmma.fence saw them. */
struct Registers {
  const void *at;
  std::vector<uint32_t> values;
};

struct Range {
  char *at;
  int bytes;
};

struct Fiber {
  uint3 thread;
  int index = 0;
  State state = State::READY;
  unsigned parity = 0;
  int accesses = 0;
  char *stack = nullptr;
  void *stack_pointer = nullptr;
  void *fake_stack = nullptr;
  ucontext_t context;
  std::vector<Copy> open;                /* since the last commit */
  std::vector<std::vector<Copy>> groups; /* committed, oldest first */
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups;
  std::vector<Registers> fenced;
  std::vector<Sums> running;  /* those that products add to, each by itself */
  std::vector<Range> written; /* in shared memory by this thread, since its last fence.proxy.async */
};

struct WarpAccess {
  Access kind;
  int bytes;
  uintptr_t address[32]; /* by lane; 0 = this lane takes no part */
};

struct Warp {
  int arrived = 0;
  unsigned mask = 0;
  uint32_t exchange[2][32][8];
  std::vector<WarpAccess> accesses; /* since the last barrier */
};

struct Block {
  uint3 index;
  dim3 size, grid;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived = 0, live = 0;
  int barrier = 0; /* the source line of the barrier that threads wait at */
  char *shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<char> stale; /* by 16 bytes of shared memory: not handed over to the asynchronous proxy */
  std::function<void()> body;
  void *stack_pointer = nullptr;
  ucontext_t context;
  void *fake_stack = nullptr;
  const void *stack_bottom = nullptr;
  size_t stack_size = 0;
};

inline thread_local Block *block;
inline thread_local Fiber *fiber;

#if defined(__x86_64__) && !defined(PNN_HOST_UCONTEXT)
#define PNN_HOST_SWITCH 1
/* Saves what a call preserves, swaps stacks. Twenty times faster than swapcontext, which enters the kernel. */
extern "C" void pnn_cuda_on_host_switch(void **save, void *to);
__asm__(
    ".pushsection .text.pnn_cuda_on_host_switch,\"axG\",@progbits,pnn_cuda_on_host_switch,comdat\n"
    ".weak pnn_cuda_on_host_switch\n"
    ".type pnn_cuda_on_host_switch,@function\n"
    "pnn_cuda_on_host_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp,(%rdi)\n  movq %rsi,%rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size pnn_cuda_on_host_switch,.-pnn_cuda_on_host_switch\n"
    ".popsection\n");
#endif

inline void switch_to_scheduler() {
  Fiber *f = fiber;
#if defined(PNN_HOST_ASAN)
  __sanitizer_start_switch_fiber(f->state == State::DONE ? nullptr : &f->fake_stack, block->stack_bottom,
                                 block->stack_size);
#endif
#if defined(PNN_HOST_SWITCH)
  pnn_cuda_on_host_switch(&f->stack_pointer, block->stack_pointer);
#else
  swapcontext(&f->context, &block->context);
#endif
#if defined(PNN_HOST_ASAN)
  __sanitizer_finish_switch_fiber(f->fake_stack, nullptr, nullptr);
#endif
}

inline void switch_to_fiber(Fiber *f) {
  fiber = f;
#if defined(PNN_HOST_ASAN)
  __sanitizer_start_switch_fiber(&block->fake_stack, f->stack, STACK_BYTES);
#endif
#if defined(PNN_HOST_SWITCH)
  pnn_cuda_on_host_switch(&block->stack_pointer, f->stack_pointer);
#else
  swapcontext(&block->context, &f->context);
#endif
#if defined(PNN_HOST_ASAN)
  __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
#endif
}

/* ---- shared-memory wavefronts ---- */

inline int wavefronts_of(const uintptr_t *address, int lanes, int bytes) {
  /* Distinct words of each bank; lanes that read the same word share it. */
  std::vector<uintptr_t> words[32];
  int most = 0;
  for (int i = 0; i < lanes; i++)
    for (int w = 0; w < std::max(bytes / 4, 1); w++) {
      const uintptr_t word = address[i] / 4 + static_cast<unsigned>(w);
      std::vector<uintptr_t> &bank = words[word % 32];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      most = std::max(most, static_cast<int>(bank.size()));
    }
  return most;
}

inline void flush_accesses(Warp &warp) {
  for (const WarpAccess &access : warp.accesses) {
    const int lanes = access.kind == MATRIX ? 8 : std::max(1, std::min(32, 128 / std::max(access.bytes, 4)));
    for (int i = 0; i < 32; i += lanes) {
      uintptr_t taking_part[32];
      int count = 0;
      for (int lane = i; lane < i + lanes; lane++)
        if (access.address[lane]) taking_part[count++] = access.address[lane];
      wavefronts.actual[access.kind] += wavefronts_of(taking_part, count, access.bytes);
      wavefronts.ideal[access.kind] += count > 0;
    }
  }
  warp.accesses.clear();
}

inline void flush_all_accesses() {
  if (!options.count_wavefronts) return;
  for (Warp &warp : block->warps) flush_accesses(warp);
  for (Fiber &f : block->fibers) f.accesses = 0;
}

/* Notes the address that this lane touches. */
inline void count_access(Access kind, const void *address, int bytes) {
  if (!options.count_wavefronts) return;
  Warp &warp = block->warps[static_cast<size_t>(fiber->index / 32)];
  const size_t number = static_cast<size_t>(fiber->accesses++);
  if (warp.accesses.size() <= number) warp.accesses.resize(number + 1, WarpAccess{kind, bytes, {}});
  warp.accesses[number].address[fiber->index % 32] = reinterpret_cast<uintptr_t>(address);
}

/* ---- barriers ---- */

inline void release_block_barrier() {
  flush_all_accesses();
  block->arrived = 0;
  for (Fiber &f : block->fibers)
    if (f.state == State::AT_BLOCK_BARRIER) f.state = State::READY;
}

/* Threads must wait at one and the same barrier, and none may be done: the hardware would mix them up or hang. */
inline void block_barrier(int line) {
  if (block->arrived && block->barrier != line)
    fail("divergent barrier: threads wait at __syncthreads of different lines");
  if (block->live != static_cast<int>(block->fibers.size())) fail("divergent barrier: a thread is done, others wait");
  block->barrier = line;
  if (++block->arrived == block->live) {
    release_block_barrier();
  } else {
    fiber->state = State::AT_BLOCK_BARRIER;
    switch_to_scheduler();
  }
}

inline void warp_barrier(unsigned mask) {
  Warp &warp = block->warps[static_cast<size_t>(fiber->index / 32)];
  if (!(mask >> (fiber->index % 32) & 1)) fail("a thread waits at a warp barrier whose mask leaves it out");
  if (warp.arrived && warp.mask != mask) fail("threads of a warp wait at one barrier with different masks");
  warp.mask = mask;
  if (++warp.arrived == __builtin_popcount(mask)) {
    warp.arrived = 0;
    const size_t first = static_cast<size_t>(fiber->index / 32 * 32);
    for (size_t i = first; i < std::min(first + 32, block->fibers.size()); i++)
      if (block->fibers[i].state == State::AT_WARP_BARRIER) block->fibers[i].state = State::READY;
  } else {
    fiber->state = State::AT_WARP_BARRIER;
    switch_to_scheduler();
  }
}

/* Every lane gives n words and sees all lanes'; two buffers in turn make one barrier enough. */
inline uint32_t (*exchange(unsigned mask, const uint32_t *values, int n))[8] {
  Warp &warp = block->warps[static_cast<size_t>(fiber->index / 32)];
  fiber->parity ^= 1;
  uint32_t(*buffer)[8] = warp.exchange[fiber->parity];
  std::memcpy(buffer[fiber->index % 32], values, sizeof(uint32_t) * static_cast<size_t>(n));
  warp_barrier(mask);
  return buffer;
}

/* ---- running a grid ---- */

inline void fiber_main() {
#if defined(PNN_HOST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &block->stack_bottom, &block->stack_size);
#endif
  block->body();
  if (!fiber->open_products.empty() || !fiber->product_groups.empty()) fail("a thread is done, its products still run");
  fiber->state = State::DONE;
  block->live--;
  if (block->arrived) fail("divergent barrier: a thread is done, others wait");
  switch_to_scheduler();
  fail("a finished thread was resumed");
}

inline void fiber_prepare(Fiber *f) {
#if defined(PNN_HOST_ASAN)
  __asan_unpoison_memory_region(f->stack, STACK_BYTES);
#endif
#if defined(PNN_HOST_SWITCH)
  void **top = reinterpret_cast<void **>(f->stack + STACK_BYTES);
  *--top = nullptr; /* the address that fiber_main would return to; keeps the stack aligned as after a call */
  *--top = reinterpret_cast<void *>(fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f->stack_pointer = top;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = STACK_BYTES;
  f->context.uc_link = nullptr;
  makecontext(&f->context, fiber_main, 0);
#endif
}

inline char *stack_of(size_t i) {
  struct Stacks {
    std::vector<char *> all;
    ~Stacks() {
      for (char *stack : all) std::free(stack);
    }
  };
  static thread_local Stacks stacks;
  while (stacks.all.size() <= i) stacks.all.push_back(static_cast<char *>(std::aligned_alloc(64, STACK_BYTES)));
  return stacks.all[i];
}

/* One turn of the scheduler; false where nobody could run. */
inline bool run_ready(const std::vector<int> &order) {
  bool progress = false;
  for (int i : order)
    if (block->fibers[static_cast<size_t>(i)].state == State::READY) {
      progress = true;
      switch_to_fiber(&block->fibers[static_cast<size_t>(i)]);
    }
  return progress;
}

/* The leading warp for as long as any of it is ready, then one turn of the others, thread by thread, until it is. */
inline bool run_greedy(const std::vector<int> &order) {
  const int threads = static_cast<int>(order.size()), warps = (threads + 31) / 32;
  const int lead = static_cast<int>(options.seed) % warps * 32, lead_end = std::min(lead + 32, threads);
  bool progress = false, ready = true;
  while (ready) {
    ready = false;
    for (int i = lead; i < lead_end; i++)
      if (block->fibers[static_cast<size_t>(i)].state == State::READY) {
        ready = progress = true;
        switch_to_fiber(&block->fibers[static_cast<size_t>(i)]);
      }
  }
  for (int i : order) {
    if (block->fibers[static_cast<size_t>(i)].state != State::READY) continue;
    progress = true;
    switch_to_fiber(&block->fibers[static_cast<size_t>(i)]);
    for (int j = lead; j < lead_end; j++)
      if (block->fibers[static_cast<size_t>(j)].state == State::READY) return true;
  }
  return progress;
}

inline void run_block(Block &b) {
  const int threads = static_cast<int>(b.fibers.size());
  std::vector<int> order(static_cast<size_t>(threads));
  for (int i = 0; i < threads; i++)
    order[static_cast<size_t>(i)] = options.order == Order::REVERSE ? threads - 1 - i : i;
  std::mt19937 random(options.seed);
  while (b.live) {
    if (options.order == Order::SHUFFLED) std::shuffle(order.begin(), order.end(), random);
    if (options.order == Order::GREEDY ? run_greedy(order) : run_ready(order)) continue;
    int at_block = 0, at_warp = 0;
    for (const Fiber &f : b.fibers) {
      at_block += f.state == State::AT_BLOCK_BARRIER;
      at_warp += f.state == State::AT_WARP_BARRIER;
    }
    char text[160];
    std::snprintf(text, sizeof text,
                  "barrier deadlock in block (%u,%u,%u): %d threads at __syncthreads, %d at a warp barrier, "
                  "%d of %d still running",
                  b.index.x, b.index.y, b.index.z, at_block, at_warp, b.live, threads);
    fail(text);
  }
  flush_all_accesses();
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 size, size_t shared_bytes, const Arguments &...arguments) {
  launches++;
  const unsigned threads = size.x * size.y * size.z;
  if (threads == 0 || threads > 1024) fail("a block has 1 to 1024 threads");
  if (shared_bytes > 232448) fail("a block has at most 227 KiB of shared memory");
  /* Exactly as long as was asked, so that the address sanitizer sees the end. */
  void *memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1))) fail("out of memory");
  const std::unique_ptr<void, decltype(&std::free)> shared(memory, &std::free);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        Block b;
        block = &b;
        b.index = {x, y, z};
        b.size = size;
        b.grid = grid;
        b.fibers.resize(threads);
        b.warps.resize((threads + 31) / 32);
        b.live = static_cast<int>(threads);
        b.shared = static_cast<char *>(shared.get());
        b.shared_bytes = shared_bytes;
        b.stale.assign((shared_bytes + 15) / 16, 0);
        std::memset(b.shared, 0xff, shared_bytes);
        b.body = [&] { kernel(arguments...); };
        for (unsigned i = 0; i < threads; i++) {
          Fiber &f = b.fibers[i];
          f.index = static_cast<int>(i);
          f.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
          f.stack = stack_of(i);
          fiber_prepare(&f);
        }
        run_block(b);
      }
  block = nullptr;
}

/* ---- cp.async ---- */

/* Bytes of shared memory are written, not by the asynchronous proxy. */
inline void mark_stale(const void *to, int bytes) {
  const size_t first = static_cast<size_t>(static_cast<const char *>(to) - block->shared);
  for (size_t i = first / 16; i < std::min((first + static_cast<size_t>(bytes) + 15) / 16, block->stale.size()); i++)
    block->stale[i] = 1;
}

inline void note_written(void *to, int bytes) {
  mark_stale(to, bytes);
  fiber->written.push_back({static_cast<char *>(to), bytes});
}

inline void copy_now(const Copy &copy) {
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  std::memset(static_cast<char *>(copy.to) + copy.bytes, 0, static_cast<size_t>(copy.zeros));
  mark_stale(copy.to, copy.bytes + copy.zeros);
}

inline void copy_async(void *to, const void *from, int size, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % static_cast<unsigned>(size) ||
      (valid && reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(size)))
    fail("cp.async of a misaligned address");
  if (valid < 0 || valid > size) fail("cp.async reads more bytes than it writes, or fewer than none");
  count_access(COPY, to, size);
  fiber->open.push_back({to, from, valid, size - valid});
  if (!options.lazy_copies) copy_now(fiber->open.back());
}

inline void copy_commit() {
  fiber->groups.push_back(fiber->open);
  fiber->open.clear();
}

inline void copy_wait(size_t pending) {
  while (fiber->groups.size() > pending) {
    for (const Copy &copy : fiber->groups.front()) {
      if (options.lazy_copies) copy_now(copy);
      fiber->written.push_back({static_cast<char *>(copy.to), copy.bytes + copy.zeros});
    }
    fiber->groups.erase(fiber->groups.begin());
  }
}

/* ---- wgmma ---- */

constexpr uint32_t SHARED_BASE = 1024;    /* where a block's shared memory starts in its window */
constexpr uint32_t RUNNING = 0x7fc0feedu; /* the bits of sums that late products have not written yet, a NaN */

inline uint32_t shared_address(const void *p) {
  const ptrdiff_t at = static_cast<const char *>(p) - block->shared;
  if (at < 0 || static_cast<size_t>(at) > block->shared_bytes) fail("an address outside of shared memory");
  return SHARED_BASE + static_cast<uint32_t>(at);
}

/* fence.proxy.async */
inline void shared_to_products() {
  for (const Range &range : fiber->written)
    for (ptrdiff_t i = (range.at - block->shared) / 16; i < (range.at + range.bytes - block->shared + 15) / 16; i++)
      block->stale[static_cast<size_t>(i)] = 0;
  fiber->written.clear();
}

/* An element of B, of `size` bytes, whose columns are D's. */
inline uint32_t matrix_element(uint64_t descriptor, int size, int depth, int column, bool transposed) {
  if (descriptor & ~UINT64_C(0x3fff3fff3fff)) fail("a matrix descriptor that is swizzled, or no descriptor");
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16; };
  const uint32_t depth_step = field(16), column_step = field(32);
  const int run = 16 / size; /* elements of a row of a core matrix */
  const uint32_t address = field(0) + static_cast<uint32_t>(depth / run) * depth_step +
                           static_cast<uint32_t>(column / 8) * column_step +
                           static_cast<uint32_t>(transposed ? depth % run : column % 8) * 16 +
                           static_cast<uint32_t>((transposed ? column : depth) % run * size);
  if (address < SHARED_BASE || address + static_cast<uint32_t>(size) > SHARED_BASE + block->shared_bytes)
    fail("wgmma reads outside of the block's shared memory");
  const size_t at = address - SHARED_BASE;
  if (block->stale[at / 16])
    fail("wgmma reads shared memory that no fence.proxy.async has handed over since its write");
  uint32_t value = 0;
  std::memcpy(&value, block->shared + at, static_cast<size_t>(size));
  return value;
}

/* wgmma.fence, for these registers. */
inline void fence_registers(const void *at, int count) {
  std::vector<uint32_t> values(static_cast<size_t>(count));
  std::memcpy(values.data(), at, values.size() * 4);
  for (Registers &known : fiber->fenced)
    if (known.at == at) return static_cast<void>(known.values = values);
  fiber->fenced.push_back({at, values});
}

inline bool is_fenced(const void *at, int count) {
  for (const Registers &known : fiber->fenced)
    if (known.at == at) return std::memcmp(known.values.data(), at, static_cast<size_t>(count) * 4) == 0;
  return false;
}

inline std::vector<Sums>::iterator running_sums(const float *sums) {
  return std::find_if(fiber->running.begin(), fiber->running.end(), [&](const Sums &s) { return s.at == sums; });
}

inline void products_add(float *sums, int count, const uint32_t *a, uint64_t b,
                         void (*add)(const Product &, float *sums)) {
  if (!is_fenced(a, 4)) fail("wgmma's operand was written after its wgmma.fence");
  if (running_sums(sums) == fiber->running.end()) {
    if (!is_fenced(sums, count)) fail("wgmma's sums were written after their wgmma.fence");
    fiber->running.push_back({sums, 0, std::vector<float>(sums, sums + count)});
    for (int i = 0; options.late_products && i < count; i++) std::memcpy(sums + i, &RUNNING, 4);
  }
  running_sums(sums)->pending++;
  const uint64_t address = reinterpret_cast<uintptr_t>(a);
  const uint32_t words[8] = {
      static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32), a[0], a[1], a[2], a[3],
      static_cast<uint32_t>(b),       static_cast<uint32_t>(b >> 32)};
  uint32_t(*all)[8] = exchange(0xffffffffu, words, 8);
  Product product{sums, count, {}, {}, b, add};
  for (int lane = 0; lane < 32; lane++)
    if (std::memcmp(all[lane] + 6, words + 6, 8)) fail("the lanes of a warp give wgmma different matrix descriptors");
  for (int i = 0; i < 4; i++) {
    const uint32_t *from = all[fiber->index % 32 / 4 * 4 + i];
    product.operands[i] = reinterpret_cast<const uint32_t *>(static_cast<uintptr_t>(from[1]) << 32 | from[0]);
    std::memcpy(product.values[i], from + 2, sizeof product.values[i]);
  }
  products++;
  product_columns = count * 2;
  if (!options.late_products) add(product, sums);
  fiber->open_products.push_back(product);
}

inline void products_commit() {
  fiber->product_groups.push_back(fiber->open_products);
  fiber->open_products.clear();
}

inline void products_finish_late(const Product &product) {
  for (int i = 0; i < product.count; i++)
    if (std::memcmp(product.sums + i, &RUNNING, 4)) fail("wgmma's sums were written while a product ran");
  for (int i = 0; i < 4; i++)
    if (std::memcmp(product.operands[i], product.values[i], sizeof product.values[i]))
      fail("wgmma's operand was written while its product ran");
  product.add(product, running_sums(product.sums)->late.data());
}

/* All lanes come here before one goes on: until then their operands are what the products read. */
inline void products_wait(size_t pending) {
  warp_barrier(0xffffffffu);
  while (fiber->product_groups.size() > pending) {
    const std::vector<Product> group = fiber->product_groups.front();
    fiber->product_groups.erase(fiber->product_groups.begin());
    for (const Product &product : group) {
      if (options.late_products) products_finish_late(product);
      const auto sums = running_sums(product.sums);
      if (--sums->pending) continue;
      if (options.late_products) std::copy(sums->late.begin(), sums->late.end(), sums->at);
      fiber->running.erase(sums);
      fence_registers(product.sums, product.count); /* whoever writes them now must do so again */
    }
  }
  warp_barrier(0xffffffffu);
}

/* ---- the tensor core ---- */

/* A factor's exponent as the hardware aligns it: denormal numbers stand at the smallest normal exponent of their type.
 */
inline int aligned_exponent(double x, int smallest) {
  int e;
  std::frexp(x, &e);
  return std::max(e - 1, smallest);
}

/* One step: c + the sum of `depth` products, to F fractional bits. */
inline float tensor_core_step(float c, const float *a, const float *b, int depth, int fraction, int smallest) {
  bool nan = std::isnan(c), plus = c == HUGE_VALF, minus = c == -HUGE_VALF;
  int top = INT32_MIN;
  if (c != 0 && std::isfinite(c)) top = aligned_exponent(c, -126);
  for (int k = 0; k < depth; k++) {
    const double p = static_cast<double>(a[k]) * b[k];
    if (std::isnan(p)) nan = true;
    if (std::isinf(p)) (p > 0 ? plus : minus) = true;
    if (p != 0 && std::isfinite(p))
      top = std::max(top, aligned_exponent(a[k], smallest) + aligned_exponent(b[k], smallest));
  }
  if (nan || (plus && minus)) return NAN;
  if (plus || minus) return plus ? HUGE_VALF : -HUGE_VALF;
  if (top == INT32_MIN) return c == 0 ? c + 0.0f : c;
  int64_t sum = static_cast<int64_t>(std::ldexp(static_cast<double>(c), fraction - top));
  for (int k = 0; k < depth; k++)
    sum += static_cast<int64_t>(std::ldexp(static_cast<double>(a[k]) * b[k], fraction - top));
  const double exact = std::ldexp(static_cast<double>(sum), top - fraction);
  if (std::fabs(exact) >= 0x1p128) return exact > 0 ? HUGE_VALF : -HUGE_VALF;
  float rounded = static_cast<float>(exact);
  if (std::fabs(static_cast<double>(rounded)) > std::fabs(exact)) rounded = std::nextafterf(rounded, 0.0f);
  return rounded;
}

inline float tensor_core(float c, const float *a, const float *b, int depth, int smallest) {
  if (options.tensor_core == TensorCore::HOPPER) return tensor_core_step(c, a, b, depth, 25, smallest);
  c = tensor_core_step(c, a, b, depth / 2, 24, smallest);
  return tensor_core_step(c, a + depth / 2, b + depth / 2, depth / 2, 24, smallest);
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::fiber->thread)
#define blockIdx (cuda_on_host::block->index)
#define blockDim (cuda_on_host::block->size)
#define gridDim (cuda_on_host::block->grid)

#define __syncthreads() cuda_on_host::block_barrier(__LINE__)
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_host::warp_barrier(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "one word");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  uint32_t(*all)[8] = cuda_on_host::exchange(mask, &word, 1);
  std::memcpy(&value, all[cuda_on_host::fiber->index % 32 ^ lane_mask], 4);
  return value;
}

#endif
