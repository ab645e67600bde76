// What the kernels ask of the machine: memory, threads, and each PTX instruction as a function of a few lines.
//
// emulation/device.h offers the same names on the host, with checks of bounds and races. Kernels include this file and nothing else,
// and reach memory only through Global and Shared.
#pragma once
#ifdef BITDIAL_EMULATION
#include "emulation/device.h"
#else

typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define DEVICE static __device__ __forceinline__
// blocks: that a multiprocessor shall hold at once, which leaves each thread so many registers; without it some compilers put values aside.
#define KERNEL(name, Args, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args)

struct Words4 {
  uint32_t v[4];
};

// A tensor in the memory of the device. bytes: its length, which only the emulator looks at.
template <class T>
struct Global {
  T* data;
  uint64_t bytes;
  __device__ __forceinline__ T get(int64_t i) const { return data[i]; }
  __device__ __forceinline__ void put(int64_t i, T value) const { data[i] = value; }
  // Four bytes at once, from an element whose address is a multiple of 4.
  __device__ __forceinline__ uint32_t get_word(int64_t i) const { return *reinterpret_cast<const uint32_t*>(data + i); }
  __device__ __forceinline__ void put_word(int64_t i, uint32_t word) const { *reinterpret_cast<uint32_t*>(data + i) = word; }
  __device__ __forceinline__ bool there() const { return data != nullptr; }
  __device__ __forceinline__ bool aligned4(int64_t i) const { return reinterpret_cast<uint64_t>(data + i) % 4 == 0; }
  __device__ __forceinline__ bool aligned16(int64_t i) const { return reinterpret_cast<uint64_t>(data + i) % 16 == 0; }
  // Sixteen bytes at once, from an element whose address is a multiple of 16.
  __device__ __forceinline__ Words4 get16(int64_t i) const {
    const uint4 w = *reinterpret_cast<const uint4*>(data + i);
    return {{w.x, w.y, w.z, w.w}};
  }
};

extern __shared__ __align__(16) unsigned char bitdial_shared[];

// The memory that the threads of a block share; offsets are in bytes.
struct Shared {
  DEVICE void put(int offset, uint8_t value) { bitdial_shared[offset] = value; }
  DEVICE void put16(int offset, const Words4& w) {
    *reinterpret_cast<uint4*>(bitdial_shared + offset) = make_uint4(w.v[0], w.v[1], w.v[2], w.v[3]);
  }
  DEVICE void put8(int offset, uint32_t first, uint32_t second) {
    *reinterpret_cast<uint2*>(bitdial_shared + offset) = make_uint2(first, second);
  }
  DEVICE void put_word(int offset, uint32_t value) { *reinterpret_cast<uint32_t*>(bitdial_shared + offset) = value; }
  DEVICE Words4 get16(int offset) {
    const uint4 w = *reinterpret_cast<const uint4*>(bitdial_shared + offset);
    return {{w.x, w.y, w.z, w.w}};
  }
  DEVICE uint32_t word(int offset) { return *reinterpret_cast<const uint32_t*>(bitdial_shared + offset); }
};

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
DEVICE void barrier() { __syncthreads(); }

// float32 operations rounded once each: the compiler must not contract a product and a sum into a fused multiply-add.
DEVICE float to_float(int v) { return __int2float_rn(v); }
DEVICE float to_float(int64_t v) { return __ll2float_rn(v); }
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE float minus(float a, float b) { return __fsub_rn(a, b); }
DEVICE float over(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float root(float a) { return __fsqrt_rn(a); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float smaller(float a, float b) { return fminf(a, b); }
DEVICE int rounded(float a) { return __float2int_rn(a); }
DEVICE int bits_of(float a) { return __float_as_int(a); }
DEVICE float from_bits(int a) { return __int_as_float(a); }

// prmt picks four bytes of eight, those of a and then those of b: hexadecimal digit i of `which` names byte i of the result.
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }

// Two float16 numbers in a word, a * b + c rounded once, to nearest even.
DEVICE uint32_t fused_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE uint32_t smaller_halves(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// The value of another lane of the warp: sums along a row add lane i + width to lane i.
DEVICE float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// cp.async copies sixteen bytes from global to shared memory without a register in between, while the tensor cores work; .cg keeps
// them out of the first cache, since each block reads a weight once.
DEVICE void copy16_later(int shared_offset, const Global<const uint8_t>& from, int64_t i) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(bitdial_shared + shared_offset));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from.data + i) : "memory");
}

// Waits for every copy that this thread has begun; others see them after the next barrier.
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ldmatrix brings four 8x8 tiles of 16-bit elements, that is 8 rows of 16 bytes each, into the fragments of the warp: the four
// registers of operand A of a 16-row product in one instruction. Each lane names one row.
DEVICE void load_fragment(uint32_t (&a)[4], int row_offset) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(bitdial_shared + row_offset));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}

#define BITDIAL_MMA(shape, ta, tb, D, A, B)                                                                          \
  asm volatile("mma.sync.aligned." shape ".row.col.s32." ta "." tb ".s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
               : "+r"(D[0]), "+r"(D[1]), "+r"(D[2]), "+r"(D[3])                                                      \
               : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]))
#define BITDIAL_MMA_HALF(ta, D, A, B)                                                                                \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." ta ".s4.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"        \
               : "+r"(D[0]), "+r"(D[1]), "+r"(D[2]), "+r"(D[3])                                                      \
               : "r"(A[0]), "r"(A[1]), "r"(B))

// 16x8 += 16x32 * 32x8 of bytes: the int8 tensor-core product, one IMMA.16832 on sm_80 to sm_90.
template <bool A_SIGNED, bool B_SIGNED>
DEVICE void multiply_bytes(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if (A_SIGNED) {
    if (B_SIGNED) BITDIAL_MMA("m16n8k32", "s8", "s8", d, a, b);
    else BITDIAL_MMA("m16n8k32", "s8", "u8", d, a, b);
  } else {
    if (B_SIGNED) BITDIAL_MMA("m16n8k32", "u8", "s8", d, a, b);
    else BITDIAL_MMA("m16n8k32", "u8", "u8", d, a, b);
  }
}

// 16x8 += 16x64 * 64x8 of nibbles, weights signed: twice the channels in the registers and the time of the int8 product, one
// IMMA.16864 on sm_80 to sm_89. Later architectures would emulate it, which is why they never compile it.
template <bool A_SIGNED>
DEVICE void multiply_nibbles(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if (A_SIGNED) BITDIAL_MMA("m16n8k64", "s4", "s4", d, a, b);
  else BITDIAL_MMA("m16n8k64", "u4", "s4", d, a, b);
}

// The half of it, 32 channels deep: what is left of a run of groups. a: rows 0..7 and 8..15.
template <bool A_SIGNED>
DEVICE void multiply_nibbles_half(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  if (A_SIGNED) BITDIAL_MMA_HALF("s4", d, a, b);
  else BITDIAL_MMA_HALF("u4", d, a, b);
}
#endif
