/*
 * ptx.h - every instruction that C++ has no word for, each with its twin for the host.
 *
 * This is the only file with inline PTX. With nvcc it is that; with a C++ compiler the twins of
 * tests/cuda/cuda_on_host.h stand behind the same names, so that the kernels run on a CPU for their tests. Device code
 * uses nothing that is missing here: no CUDA math, no CUDA types, so that both compile to the same arithmetic.
 * Compile with -fmad=false (nvcc) or -ffp-contract=off (host): a fused multiply-add happens where fma_ is written.
 */
#ifndef PNN_CUDA_PTX_H
#define PNN_CUDA_PTX_H

#include <stdint.h>
#include <string.h>

#if !defined(__CUDACC__)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#define PNN_DEVICE __device__ __forceinline__
#define PNN_HOST_DEVICE __host__ __device__ __forceinline__

namespace pnn_cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
/* A float32 whose products the tensor cores make: stored as any other, rounded to TF32 where it becomes an operand. */
struct tf32 {
  float value;
};
/* 8 and 16 bytes, as they move in one instruction. */
struct alignas(8) words2 {
  uint32_t w[2];
};
struct alignas(16) words4 {
  uint32_t w[4];
};

#if defined(__CUDACC__)

/* The address is made once, behind the compiler's back: it would make it again, in four instructions, at each use. */
#define PNN_SHARED_MEMORY(name)                                                       \
  extern __shared__ __align__(128) unsigned char name##_[];                           \
  uint32_t name##_address = static_cast<uint32_t>(__cvta_generic_to_shared(name##_)); \
  asm volatile("" : "+r"(name##_address));                                            \
  char *const name = static_cast<char *>(__cvta_shared_to_generic(name##_address))

PNN_DEVICE uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/* 16 bytes from global to shared memory, of which the first `valid` are read and the rest become zero. */
PNN_DEVICE void copy_async16(void *to, const void *from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
/* All 16 bytes, or zeros where !there: the address is not looked at then. */
PNN_DEVICE void copy_async16_or_zero(void *to, const void *from, bool there) {
  asm volatile("{ .reg .pred away; setp.eq.u32 away, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, away; }" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(static_cast<uint32_t>(there))
               : "memory");
}
/* 4 bytes, or zeros where !there; they go by the L1 cache. */
PNN_DEVICE void copy_async4_or_zero(void *to, const void *from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0)
               : "memory");
}
PNN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
PNN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 and gets, of each matrix,
 * the two elements (i / 4, 2 * (i % 4) + {0, 1}); of the transposed one in the second function. */
PNN_DEVICE void load_matrices(uint32_t r[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PNN_DEVICE void load_matrices_transposed(uint32_t r[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/* c[16][8] += a[16][16] * b[16][8], the operands spread over the warp as the PTX manual draws them (m16n8k16). */
PNN_DEVICE void multiply(bfloat16, float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PNN_DEVICE void multiply(float16, float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* c[16][8] += a[16][8] * b[8][8] of TF32 values, one to a register (m16n8k8). */
PNN_DEVICE void multiply_tf32(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Rounds to TF32's 10 bits of fraction, to nearest, ties away from zero. */
PNN_DEVICE uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
/* The same with ties to even, in the one instruction that Hopper has for it where the other takes three, and of
 * max(x, 0): for sm_90 and newer. */
PNN_DEVICE uint32_t to_tf32_even(float x) {
  uint32_t r;
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
PNN_DEVICE uint32_t to_tf32_even_relu(float x) {
  uint32_t r;
  asm("cvt.rn.relu.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

/* max(x, 0), NaN for NaN; of the two zeros either. One instruction, where `x < 0 ? 0 : x` is two. */
PNN_DEVICE float relu_any_zero(float x) {
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));
  return r;
}
/* relu_any_zero of two numbers, rounded to a pair of 16-bit ones, in one instruction. */
PNN_DEVICE uint32_t round_pair_relu(bfloat16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
PNN_DEVICE uint32_t round_pair_relu(float16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
/* Two numbers, rounded to a pair of 16-bit ones. */
PNN_DEVICE uint32_t round_pair(bfloat16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
PNN_DEVICE uint32_t round_pair(float16, float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
/* Of the eight bytes of a (0 to 3) and b (4 to 7), the four that the selector's digits name. */
PNN_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
/* x, of which the compiler forgets where it comes from: what it could make again in a loop stays in a register. */
PNN_DEVICE uint32_t keep(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
PNN_DEVICE int keep(int x) { return static_cast<int>(keep(static_cast<uint32_t>(x))); }
PNN_DEVICE const char *keep(const char *x) {
  asm volatile("" : "+l"(x));
  return x;
}
/* threadIdx.x, which the compiler knows to be no negative number: it divides by shifts alone. blockIdx.y is 0; with it
 * the assembler keeps the sum in a register, where it would read the slow special register in every step of a loop. */
PNN_DEVICE int thread_index() {
  const unsigned thread = threadIdx.x + blockIdx.y;
  __builtin_assume(thread < 1024);
  return static_cast<int>(thread);
}

PNN_DEVICE float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PNN_DEVICE double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }
PNN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
PNN_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }
PNN_DEVICE uint64_t bits_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
PNN_DEVICE double double_of(uint64_t x) { return __longlong_as_double(static_cast<long long>(x)); }
PNN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
PNN_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

PNN_DEVICE bfloat16 round_to(bfloat16, float x) {
  bfloat16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
PNN_DEVICE float16 round_to(float16, float x) {
  float16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
PNN_DEVICE float widen(float16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}

/* Shared memory, by whole words; the host's twins count the banks. */
PNN_DEVICE words4 load_shared(const words4 *p) { return *p; }
PNN_DEVICE float load_shared(const float *p) { return *p; }
PNN_DEVICE uint32_t load_shared(const uint32_t *p) { return *p; }
PNN_DEVICE words2 load_shared(const words2 *p) { return *p; }
PNN_DEVICE void store_shared(words4 *p, words4 v) { *p = v; }
PNN_DEVICE void store_shared(uint32_t *p, uint32_t v) { *p = v; }
/* 16 bytes in one instruction; the compiler may take a plain assignment apart. */
PNN_DEVICE void store_shared_whole(words4 *p, words4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.w[0]), "r"(v.w[1]),
               "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
PNN_DEVICE void store_global(words4 *p, words4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.w[0]), "r"(v.w[1]),
               "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
PNN_DEVICE void store_global(words2 *p, words2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.w[0]), "r"(v.w[1])
               : "memory");
}
/* Without a branch around the store. */
PNN_DEVICE void store_global_if(bool wanted, uint32_t *p, uint32_t v) {
  asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %0, 0; @wanted st.global.u32 [%1], %2; }" ::"r"(
                   static_cast<uint32_t>(wanted)),
               "l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
}
PNN_DEVICE void store_global_if(bool wanted, words2 *p, words2 v) {
  asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %0, 0; @wanted st.global.v2.u32 [%1], {%2, %3}; }" ::"r"(
                   static_cast<uint32_t>(wanted)),
               "l"(__cvta_generic_to_global(p)), "r"(v.w[0]), "r"(v.w[1])
               : "memory");
}
PNN_DEVICE words4 load_global(const words4 *p) {
  words4 v;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(__cvta_generic_to_global(p)));
  return v;
}
PNN_DEVICE words2 load_global(const words2 *p) {
  words2 v;
  asm("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(__cvta_generic_to_global(p)));
  return v;
}
PNN_DEVICE uint32_t load_global(const uint32_t *p) {
  uint32_t v;
  asm("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)));
  return v;
}
/* 0 where !there, without a branch: the address is not looked at then. */
PNN_DEVICE uint32_t load_global_or_zero(bool there, const uint32_t *p) {
  uint32_t v;
  asm("{ .reg .pred there; setp.ne.u32 there, %2, 0; mov.u32 %0, 0; @there ld.global.u32 %0, [%1]; }"
      : "=&r"(v)
      : "l"(__cvta_generic_to_global(p)), "r"(static_cast<uint32_t>(there)));
  return v;
}
PNN_DEVICE words2 load_global_or_zero(bool there, const words2 *p) {
  words2 v;
  asm("{ .reg .pred there; setp.ne.u32 there, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; "
      "@there ld.global.v2.u32 {%0, %1}, [%2]; }"
      : "=&r"(v.w[0]), "=&r"(v.w[1])
      : "l"(__cvta_generic_to_global(p)), "r"(static_cast<uint32_t>(there)));
  return v;
}
/* A hint: what is around p will be read soon. */
PNN_DEVICE void prefetch_global(const char *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}
PNN_DEVICE void note_load(const void *, int) {}
PNN_DEVICE void note_store(void *, int) {}

/* ---- Hopper's asynchronous products (wgmma): of sm_90a alone ---- */

/* A warpgroup's (128 threads') product D[64][N] += A[64][16] * B[16][N], of depth 8 with TF32, reads A and D in the
 * threads' registers and B in shared memory, and runs on while the threads do other things:
 *
 *     products_start(d)            before the first one: d has its first values
 *     products_operand(a)          a has been written
 *     products_add(type, d, a, b)  enqueues one; products_add_transposed one whose B lies the other way (16-bit types)
 *     products_commit()            those since the last commit are a group
 *     products_wait<PENDING>()     of the groups, at most PENDING still run: the others' a may be written again
 *     products_finish(d)           none runs, and d may be read
 *
 * Until then d, the a of products that run, and what they read of shared memory, are theirs. Warp w holds rows 16 w to
 * 16 w + 15, spread over its lanes as mma.sync's are. */

/* What the first N / 2 operands of an assembly text are called, and what they are. */
#define PNN_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define PNN_TEXT_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " PNN_TEN(1) PNN_TEN(2) "%30, %31"
#define PNN_TEXT_64 PNN_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, " PNN_TEN(4) PNN_TEN(5) "%60, %61, %62, %63"
#define PNN_TEXT_128 \
  PNN_TEXT_64 ", %64, %65, %66, %67, %68, %69, " PNN_TEN(7) PNN_TEN(8) PNN_TEN(9) PNN_TEN(10) PNN_TEN(11) "%120, " \
              "%121, %122, %123, %124, %125, %126, %127"
#define PNN_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PNN_SUMS_16(i) PNN_SUMS_4(i), PNN_SUMS_4(i + 4), PNN_SUMS_4(i + 8), PNN_SUMS_4(i + 12)
#define PNN_SUMS_32 PNN_SUMS_16(0), PNN_SUMS_16(16)
#define PNN_SUMS_64 PNN_SUMS_32, PNN_SUMS_16(32), PNN_SUMS_16(48)
#define PNN_SUMS_128 PNN_SUMS_64, PNN_SUMS_16(64), PNN_SUMS_16(80), PNN_SUMS_16(96), PNN_SUMS_16(112)

/* The registers stand among the operands so that no write to them moves behind the fence, no read before the wait. */
#define PNN_PRODUCTS(n, sums, a0, a1, a2, a3, b, one)                                                         \
  PNN_DEVICE void products_start(float(&d)[sums]) {                                                           \
    asm volatile("wgmma.fence.sync.aligned;" : PNN_SUMS_##sums : : "memory");                                 \
  }                                                                                                           \
  PNN_DEVICE void products_finish(float(&d)[sums]) {                                                          \
    asm volatile("wgmma.wait_group.sync.aligned 0;" : PNN_SUMS_##sums : : "memory");                          \
  }                                                                                                           \
  PNN_PRODUCT(products_add, bfloat16, "k16.f32.bf16.bf16", ", 0", n, sums, a0, a1, a2, a3, b, one)            \
  PNN_PRODUCT(products_add, float16, "k16.f32.f16.f16", ", 0", n, sums, a0, a1, a2, a3, b, one)               \
  PNN_PRODUCT(products_add, tf32, "k8.f32.tf32.tf32", "", n, sums, a0, a1, a2, a3, b, one)                    \
  PNN_PRODUCT(products_add_transposed, bfloat16, "k16.f32.bf16.bf16", ", 1", n, sums, a0, a1, a2, a3, b, one) \
  PNN_PRODUCT(products_add_transposed, float16, "k16.f32.f16.f16", ", 1", n, sums, a0, a1, a2, a3, b, one)
/* `transposed` is the instruction's last operand, which TF32 does not have. */
#define PNN_PRODUCT(function, type, kind, transposed, n, sums, a0, a1, a2, a3, b, one)                             \
  PNN_DEVICE void function(type, float(&d)[sums], const uint32_t(&a)[4], uint64_t b_) {                            \
    asm volatile("{ .reg .pred add; setp.ne.u32 add, %" #one ", 0; wgmma.mma_async.sync.aligned.m64n" #n kind      \
                 " {" PNN_TEXT_##sums "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", add, 1, 1" transposed \
                                      "; }"                                                                        \
                 : PNN_SUMS_##sums                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_), "n"(1)                                     \
                 : "memory");                                                                                      \
  }
PNN_PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37)
PNN_PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69)
PNN_PRODUCTS(256, 128, 128, 129, 130, 131, 132, 133)
PNN_DEVICE void products_operand(uint32_t (&a)[4]) {
  asm volatile("wgmma.fence.sync.aligned;" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]) : : "memory");
}
PNN_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
PNN_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* What this thread has written to shared memory, its cp.async among it as far as it has waited for them, is there for
 * products that are enqueued after the next barrier: they read it by another way, the asynchronous proxy. */
PNN_DEVICE void shared_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else /* ---- the twins ---- */

#define PNN_SHARED_MEMORY(name) char *const name = cuda_on_host::block->shared

inline void copy_async16(void *to, const void *from, int valid) { cuda_on_host::copy_async(to, from, 16, valid); }
inline void copy_async16_or_zero(void *to, const void *from, bool there) {
  cuda_on_host::copy_async(to, from, 16, there ? 16 : 0);
}
inline void copy_async4_or_zero(void *to, const void *from, bool there) {
  cuda_on_host::copy_async(to, from, 4, there ? 4 : 0);
}
inline void copy_commit() { cuda_on_host::copy_commit(); }
template <int PENDING>
void copy_wait() {
  cuda_on_host::copy_wait(PENDING);
}

inline void load_matrices_twin(uint32_t r[4], const void *row, bool transposed) {
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  if (address % 16) cuda_on_host::fail("ldmatrix of a row that is not aligned to 16 bytes");
  cuda_on_host::count_access(cuda_on_host::MATRIX, row, 16);
  const uint32_t words[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  uint32_t(*all)[8] = cuda_on_host::exchange(0xffffffffu, words, 2);
  const int lane = cuda_on_host::fiber->index % 32;
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t pair[2];
    for (int e = 0; e < 2; e++) {
      const int i = lane / 4, j = lane % 4 * 2 + e;
      const uint32_t *from = all[matrix * 8 + (transposed ? j : i)];
      const char *data = reinterpret_cast<const char *>(static_cast<uintptr_t>(from[1]) << 32 | from[0]);
      memcpy(&pair[e], data + (transposed ? i : j) * 2, 2);
    }
    r[matrix] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
  }
}
inline void load_matrices(uint32_t r[4], const void *row) { load_matrices_twin(r, row, false); }
inline void load_matrices_transposed(uint32_t r[4], const void *row) { load_matrices_twin(r, row, true); }

inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class To, class From>
To reinterpret(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "same bits");
  memcpy(&to, &from, sizeof to);
  return to;
}
inline uint32_t bits_of(float x) { return reinterpret<uint32_t>(x); }
inline float float_of(uint32_t x) { return reinterpret<float>(x); }
inline uint64_t bits_of(double x) { return reinterpret<uint64_t>(x); }
inline double double_of(uint64_t x) { return reinterpret<double>(x); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  __extension__ typedef unsigned __int128 wide;
  return static_cast<uint64_t>(static_cast<wide>(a) * b >> 64);
}

inline bfloat16 round_to(bfloat16, float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline float16 round_to(float16, float x) {
  const uint32_t bits = bits_of(x), rest = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  uint32_t r;
  if (x != x)
    return {0x7fff};
  else if (rest >= 0x477ff000u) /* 65520 and above */
    r = 0x7c00u;
  else if (rest >= 0x38800000u)
    r = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  else /* a multiple of 2^-24, which is what adding 0.5 rounds to */
    r = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  return {static_cast<uint16_t>(sign | r)};
}
inline float widen(float16 x) {
  const uint32_t rest = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t bits = rest >= 0x7c00u ? 0x7f800000u | rest << 13 : bits_of(float_of(rest << 13) * 0x1p112f);
  return float_of(bits | sign);
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fffffffu;
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}
inline uint32_t to_tf32_even(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fffffffu;
  return (bits + 0xfffu + (bits >> 13 & 1)) & 0xffffe000u; /* infinity stays what it is */
}
inline uint32_t to_tf32_even_relu(float x) { return to_tf32_even(x < 0 ? 0.0f : x); }

inline float relu_any_zero(float x) { return x < 0 ? 0.0f : x; }
template <class T>
uint32_t round_pair_relu(T type, float low, float high) {
  return static_cast<uint32_t>(round_to(type, relu_any_zero(high)).bits) << 16 |
         round_to(type, relu_any_zero(low)).bits;
}
template <class T>
uint32_t round_pair(T type, float low, float high) {
  return static_cast<uint32_t>(round_to(type, high).bits) << 16 | round_to(type, low).bits;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return r;
}
inline int thread_index() { return static_cast<int>(threadIdx.x); }
template <class T>
T keep(T x) {
  return x;
}

inline float element_of(bfloat16, uint32_t word, int half) { return float_of(half ? word & 0xffff0000u : word << 16); }
inline float element_of(float16, uint32_t word, int half) {
  return widen(float16{static_cast<uint16_t>(half ? word >> 16 : word)});
}
/* The hardware reads the upper 19 bits. */
inline float element_of(tf32, uint32_t word, int) { return float_of(word & 0xffffe000u); }
constexpr int smallest_exponent(bfloat16) { return -126; }
constexpr int smallest_exponent(tf32) { return -126; }
constexpr int smallest_exponent(float16) { return -14; }

/* Lane i holds, of a: rows i / 4 (+ 8), columns 2 * (i % 4) + {0, 1} (+ 8); of b: rows 2 * (i % 4) + {0, 1} (+ 8),
 * column i / 4; of c: rows i / 4 (+ 8), columns 2 * (i % 4) + {0, 1}. */
template <class T>
void multiply(T type, float c[4], const uint32_t a[4], const uint32_t b[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint32_t(*all)[8] = cuda_on_host::exchange(0xffffffffu, words, 6);
  const int lane = cuda_on_host::fiber->index % 32;
  for (int e = 0; e < 4; e++) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float x[16], y[16];
    for (int k = 0; k < 16; k++) {
      x[k] = element_of(type, all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
      y[k] = element_of(type, all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    }
    c[e] = cuda_on_host::tensor_core(c[e], x, y, 16, smallest_exponent(type));
  }
}
/* a: rows i / 4 (+ 8), columns i % 4 (+ 4); b: rows i % 4 (+ 4), column i / 4. */
inline void multiply_tf32(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint32_t(*all)[8] = cuda_on_host::exchange(0xffffffffu, words, 6);
  const int lane = cuda_on_host::fiber->index % 32;
  for (int e = 0; e < 4; e++) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float x[8], y[8];
    for (int k = 0; k < 8; k++) {
      x[k] = element_of(tf32{}, all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2], 0);
      y[k] = element_of(tf32{}, all[column * 4 + k % 4][4 + k / 4], 0);
    }
    c[e] = cuda_on_host::tensor_core(c[e], x, y, 8, smallest_exponent(tf32{}));
  }
}

inline uint32_t shared_address(const void *p) { return cuda_on_host::shared_address(p); }
/* Element k, of a product's depth, of a thread's row in A: four threads have a row's, as in mma.sync. */
template <class T>
float product_element(T, const cuda_on_host::Product &product, int row, int k) {
  return element_of(T{}, product.values[k % 8 / 2][row + k / 8 * 2], k % 2);
}
inline float product_element(tf32, const cuda_on_host::Product &product, int row, int k) {
  return element_of(tf32{}, product.values[k % 4][row + k / 4 * 2], 0);
}
/* The operand's rows and d are spread as mma.sync's are; d[4 n + ...] are columns 8 n + .... */
template <class T, bool TRANSPOSED>
void product_add_twin(const cuda_on_host::Product &product, float *d) {
  constexpr int SIZE = static_cast<int>(sizeof(T)), DEPTH = 32 / SIZE;
  const int lane = cuda_on_host::fiber->index % 32;
  float x[2][DEPTH];
  for (int row = 0; row < 2; row++)
    for (int k = 0; k < DEPTH; k++) x[row][k] = product_element(T{}, product, row, k);
  for (int i = 0; i < product.count; i += 4)
    for (int e = 0; e < 2; e++) {
      float y[DEPTH];
      for (int k = 0; k < DEPTH; k++) {
        const int column = i * 2 + lane % 4 * 2 + e;
        y[k] = element_of(T{}, cuda_on_host::matrix_element(product.b, SIZE, k, column, TRANSPOSED), 0);
      }
      for (int row = 0; row < 2; row++)
        d[i + row * 2 + e] = cuda_on_host::tensor_core(d[i + row * 2 + e], x[row], y, DEPTH, smallest_exponent(T{}));
    }
}
template <class T, int SUMS>
void products_add(T, float (&d)[SUMS], const uint32_t (&a)[4], uint64_t b) {
  cuda_on_host::products_add(d, SUMS, a, b, product_add_twin<T, false>);
}
template <class T, int SUMS>
void products_add_transposed(T, float (&d)[SUMS], const uint32_t (&a)[4], uint64_t b) {
  cuda_on_host::products_add(d, SUMS, a, b, product_add_twin<T, true>);
}
template <int SUMS>
void products_start(float (&d)[SUMS]) {
  cuda_on_host::fence_registers(d, SUMS);
}
template <int SUMS>
void products_finish(float (&)[SUMS]) {
  cuda_on_host::products_wait(0);
}
inline void products_operand(uint32_t (&a)[4]) { cuda_on_host::fence_registers(a, 4); }
inline void products_commit() { cuda_on_host::products_commit(); }
template <int PENDING>
void products_wait() {
  cuda_on_host::products_wait(PENDING);
}
inline void shared_to_products() { cuda_on_host::shared_to_products(); }

inline void check_shared_alignment(const void *p, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) cuda_on_host::fail("a misaligned access to shared memory");
}
inline words4 load_shared(const words4 *p) {
  check_shared_alignment(p, 16);
  cuda_on_host::count_access(cuda_on_host::LOAD, p, 16);
  return *p;
}
inline words2 load_shared(const words2 *p) {
  check_shared_alignment(p, 8);
  cuda_on_host::count_access(cuda_on_host::LOAD, p, 8);
  return *p;
}
inline uint32_t load_shared(const uint32_t *p) {
  check_shared_alignment(p, 4);
  cuda_on_host::count_access(cuda_on_host::LOAD, p, 4);
  return *p;
}
inline float load_shared(const float *p) {
  check_shared_alignment(p, 4);
  cuda_on_host::count_access(cuda_on_host::LOAD, p, 4);
  return *p;
}
inline void store_shared(words4 *p, words4 v) {
  check_shared_alignment(p, 16);
  cuda_on_host::count_access(cuda_on_host::STORE, p, 16);
  cuda_on_host::note_written(p, 16);
  *p = v;
}
inline void store_shared(uint32_t *p, uint32_t v) {
  check_shared_alignment(p, 4);
  cuda_on_host::count_access(cuda_on_host::STORE, p, 4);
  cuda_on_host::note_written(p, 4);
  *p = v;
}
inline void store_shared_whole(words4 *p, words4 v) { store_shared(p, v); }
inline void store_global(words4 *p, words4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) cuda_on_host::fail("a misaligned store to device memory");
  *p = v;
}
inline void store_global(words2 *p, words2 v) {
  if (reinterpret_cast<uintptr_t>(p) % 8) cuda_on_host::fail("a misaligned store to device memory");
  *p = v;
}
inline void store_global_if(bool wanted, uint32_t *p, uint32_t v) {
  if (!wanted) return;
  if (reinterpret_cast<uintptr_t>(p) % 4) cuda_on_host::fail("a misaligned store to device memory");
  *p = v;
}
inline void store_global_if(bool wanted, words2 *p, words2 v) {
  if (wanted) store_global(p, v);
}
inline uint32_t load_global(const uint32_t *p) {
  if (reinterpret_cast<uintptr_t>(p) % 4) cuda_on_host::fail("a misaligned load from device memory");
  return *p;
}
inline words2 load_global(const words2 *p) {
  if (reinterpret_cast<uintptr_t>(p) % 8) cuda_on_host::fail("a misaligned load from device memory");
  return *p;
}
inline words4 load_global(const words4 *p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) cuda_on_host::fail("a misaligned load from device memory");
  return *p;
}
inline uint32_t load_global_or_zero(bool there, const uint32_t *p) { return there ? load_global(p) : 0; }
inline words2 load_global_or_zero(bool there, const words2 *p) { return there ? load_global(p) : words2{{0, 0}}; }
inline void prefetch_global(const char *p) { static_cast<void>(*static_cast<const volatile char *>(p)); }
inline void note_load(const void *p, int bytes) { cuda_on_host::count_access(cuda_on_host::LOAD, p, bytes); }
inline void note_store(void *p, int bytes) { cuda_on_host::count_access(cuda_on_host::STORE, p, bytes); }

#endif

/* How products_add finds B in shared memory: as "core matrices" of 8 columns of D by 8 of depth (4 with TF32), 128
 * contiguous bytes each, a column's 16 bytes in a row; the next ones in depth lie `depth_step` bytes further, the next
 * 8 columns `column_step`. (PTX ISA, "Matrix descriptor": no swizzling, K-major; all addresses are multiples of 16.) */
PNN_DEVICE uint64_t matrix_descriptor(const void *p, int depth_step, int column_step) {
  return static_cast<uint64_t>((shared_address(p) & 0x3ffffu) >> 4) | static_cast<uint64_t>(depth_step >> 4) << 16 |
         static_cast<uint64_t>(column_step >> 4) << 32;
}
/* The same for products_add_transposed: a core matrix has eight columns' numbers of one depth in a row, then those of
 * the next one. (N-major; CUTLASS's make_gmma_desc, "INTERLEAVE", has the leading offset in depth here as well.) */
PNN_DEVICE uint64_t matrix_descriptor_transposed(const void *p, int depth_step, int column_step) {
  return matrix_descriptor(p, depth_step, column_step);
}

PNN_DEVICE float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
PNN_DEVICE float widen(float x) { return x; }
PNN_DEVICE double widen(double x) { return x; }
PNN_DEVICE float widen(tf32 x) { return x.value; }
PNN_DEVICE float round_to(float, float x) { return x; }
PNN_DEVICE tf32 round_to(tf32, float x) { return {x}; }
PNN_DEVICE double round_to(double, double x) { return x; }

/* x as a float from which a further rounding to 16 bits gives what one rounding would: inexact results become odd
 * (Boldo, Melquiond, "When double rounding is odd", 2005). */
PNN_DEVICE float float_to_odd(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits = bits_of(f);
  if (static_cast<double>(f) == x || x != x || (bits & 0x7fffffffu) == 0x7f800000u) return f;
  const double size = f < 0 ? -static_cast<double>(f) : static_cast<double>(f), wanted = x < 0 ? -x : x;
  if (size > wanted) bits--; /* toward zero first */
  return float_of(bits | 1);
}

}  // namespace pnn_cuda

#endif
