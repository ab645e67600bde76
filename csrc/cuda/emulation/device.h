// The names of ../device.h on the host. Every access is checked: bounds of tensors and of shared memory, races between barriers, reads
// of shared memory that nobody wrote. A thread of a block is a fiber; instructions of a whole warp wait for its 32 lanes.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulation {
int thread_index();
int block_index(int axis);
int block_threads();
void barrier();
[[noreturn]] void fail(const char* what);
void touch_global(const void* address, size_t size, bool write);
unsigned char* touch_shared(int offset, size_t size, bool write);
void copy_later(int shared_offset, const void* from);
void wait_for_copies();
// Runs `all` once the 32 lanes of the warp have come to the same instruction, with what each of them brought.
void together(const void* instruction, void* operands, void (*all)(void* const (&lanes)[32]));
extern uint64_t products;  // tensor-core instructions of warps so far
void add_kernel(const char* name, void (*run)(const void* args), size_t args_size, int threads);
}  // namespace emulation

#define DEVICE static inline
#define KERNEL(name, Args, threads, blocks) \
  static void name##_body(const Args args);                                                              \
  static void name##_run(const void* args) { name##_body(*static_cast<const Args*>(args)); }             \
  static const bool name##_known = (emulation::add_kernel(#name, name##_run, sizeof(Args), threads), true); \
  static void name##_body(const Args args)

struct Words4 {
  uint32_t v[4];
};

template <class T>
struct Global {
  T* data;
  uint64_t bytes;
  T get(int64_t i) const {
    check(i, sizeof(T), sizeof(T));
    emulation::touch_global(data + i, sizeof(T), false);
    return data[i];
  }
  void put(int64_t i, T value) const {
    check(i, sizeof(T), sizeof(T));
    emulation::touch_global(data + i, sizeof(T), true);
    data[i] = value;
  }
  uint32_t get_word(int64_t i) const {
    check(i, 4, 4);
    emulation::touch_global(data + i, 4, false);
    uint32_t w;
    std::memcpy(&w, data + i, 4);
    return w;
  }
  void put_word(int64_t i, uint32_t word) const {
    check(i, 4, 4);
    emulation::touch_global(data + i, 4, true);
    std::memcpy(data + i, &word, 4);
  }
  bool there() const { return data != nullptr; }
  bool aligned4(int64_t i) const { return reinterpret_cast<uintptr_t>(data + i) % 4 == 0; }
  bool aligned16(int64_t i) const { return reinterpret_cast<uintptr_t>(data + i) % 16 == 0; }
  Words4 get16(int64_t i) const {
    check(i, 16, 16);
    emulation::touch_global(data + i, 16, false);
    Words4 w;
    std::memcpy(&w, data + i, 16);
    return w;
  }
  void check(int64_t i, size_t size, size_t alignment) const {
    if (i < 0 || static_cast<uint64_t>(i) * sizeof(T) + size > bytes) emulation::fail("access beyond a tensor");
    if (reinterpret_cast<uintptr_t>(data + i) % alignment) emulation::fail("misaligned access to a tensor");
  }
};

struct Shared {
  static void put(int offset, uint8_t value) { *emulation::touch_shared(offset, 1, true) = value; }
  static void put16(int offset, const Words4& w) { std::memcpy(emulation::touch_shared(offset, 16, true), &w, 16); }
  static void put8(int offset, uint32_t first, uint32_t second) {
    const uint32_t both[2] = {first, second};
    std::memcpy(emulation::touch_shared(offset, 8, true), both, 8);
  }
  static void put_word(int offset, uint32_t value) { std::memcpy(emulation::touch_shared(offset, 4, true), &value, 4); }
  static Words4 get16(int offset) {
    Words4 w;
    std::memcpy(&w, emulation::touch_shared(offset, 16, false), 16);
    return w;
  }
  static uint32_t word(int offset) {
    uint32_t w;
    std::memcpy(&w, emulation::touch_shared(offset, 4, false), 4);
    return w;
  }
};

DEVICE int thread_index() { return emulation::thread_index(); }
DEVICE int block_x() { return emulation::block_index(0); }
DEVICE int block_y() { return emulation::block_index(1); }
DEVICE int block_z() { return emulation::block_index(2); }
DEVICE int block_threads() { return emulation::block_threads(); }
DEVICE void barrier() { emulation::barrier(); }

DEVICE float to_float(int v) { return static_cast<float>(v); }
DEVICE float to_float(int64_t v) { return static_cast<float>(v); }
DEVICE float times(float a, float b) { return a * b; }
DEVICE float plus(float a, float b) { return a + b; }
DEVICE float minus(float a, float b) { return a - b; }
DEVICE float over(float a, float b) { return a / b; }
DEVICE float root(float a) { return std::sqrt(a); }
DEVICE float larger(float a, float b) { return std::fmax(a, b); }
DEVICE float smaller(float a, float b) { return std::fmin(a, b); }
DEVICE int rounded(float a) { return static_cast<int>(std::nearbyint(a)); }
DEVICE int bits_of(float a) {
  int bits;
  std::memcpy(&bits, &a, 4);
  return bits;
}
DEVICE float from_bits(int a) {
  float value;
  std::memcpy(&value, &a, 4);
  return value;
}

DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<uint32_t>(both >> (8 * (which >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

// float16, of the numbers that kernels here meet: zero and normal ones.
inline double half_value(uint32_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31 || (exponent == 0 && mantissa)) emulation::fail("a float16 number that is not normal");
  const double value = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : 0.0;
  return bits & 0x8000 ? -value : value;
}
inline uint32_t half_bits(double value) {
  if (value == 0) return std::signbit(value) ? 0x8000 : 0;
  int exponent;
  double mantissa = std::nearbyint(std::ldexp(std::frexp(std::fabs(value), &exponent), 11));  // half to even
  if (mantissa == 2048) mantissa = 1024, exponent++;
  if (exponent < -13 || exponent > 16) emulation::fail("a float16 result that is not normal");
  return (value < 0 ? 0x8000u : 0u) | static_cast<uint32_t>(exponent + 14) << 10 | (static_cast<uint32_t>(mantissa) & 1023);
}
template <class F>
uint32_t of_halves(F f) {
  return half_bits(f(0)) | half_bits(f(16)) << 16;
}
DEVICE uint32_t fused_halves(uint32_t a, uint32_t b, uint32_t c) {  // exact in double: 11 + 11 bits, and 11 more near them
  return of_halves([=](int i) { return half_value(a >> i & 0xffff) * half_value(b >> i & 0xffff) + half_value(c >> i & 0xffff); });
}
DEVICE uint32_t smaller_halves(uint32_t a, uint32_t b) {
  return of_halves([=](int i) { return std::fmin(half_value(a >> i & 0xffff), half_value(b >> i & 0xffff)); });
}
DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
  return of_halves([=](int i) { return std::fmax(half_value(a >> i & 0xffff), half_value(b >> i & 0xffff)); });
}

DEVICE float from_lane(float value, int lane) {
  struct Lane {
    float value;
    int from;
    float result;
  } mine{value, lane, 0.0f};
  static const char instruction = 0;
  emulation::together(&instruction, &mine, [](void* const(&lanes)[32]) {
    for (void* lane : lanes) {
      Lane& own = *static_cast<Lane*>(lane);
      own.result = static_cast<Lane*>(lanes[own.from & 31])->value;
    }
  });
  return mine.result;
}

DEVICE void copy16_later(int shared_offset, const Global<const uint8_t>& from, int64_t i) {
  from.check(i, 16, 16);
  emulation::touch_global(from.data + i, 16, false);
  emulation::copy_later(shared_offset, from.data + i);
}
DEVICE void wait_for_copies() { emulation::wait_for_copies(); }

DEVICE void load_fragment(uint32_t (&a)[4], int row_offset) {
  struct Lane {
    int row;
    unsigned char bytes[16];
    uint32_t a[4];
  } mine{row_offset, {}, {}};
  if (row_offset % 16) emulation::fail("ldmatrix of a row that is not aligned to 16 bytes");
  std::memcpy(mine.bytes, emulation::touch_shared(row_offset, 16, false), 16);
  static const char instruction = 0;
  emulation::together(&instruction, &mine, [](void* const(&lanes)[32]) {
    for (int lane = 0; lane < 32; lane++)  // register t of a lane: row lane / 4 of tile t, bytes 4 * (lane % 4) and on
      for (int tile = 0; tile < 4; tile++)
        std::memcpy(&static_cast<Lane*>(lanes[lane])->a[tile],
                    static_cast<Lane*>(lanes[tile * 8 + lane / 4])->bytes + 4 * (lane % 4), 4);
  });
  std::memcpy(a, mine.a, sizeof(a));
}

// Fragments of mma.sync with 32-bit registers (PTX manual, m16n8k32 and m16n8k64): element e of A's register r is row
// lane / 4 + 8 * (r % 2), column (lane % 4) * per + e + 4 * per * (r / 2); of B's register r column lane / 4, row (lane % 4) * per + e
// + 4 * per * r; accumulator i is row lane / 4 + 8 * (i / 2), column (lane % 4) * 2 + i % 2.
struct ProductLane {
  int* d;
  uint32_t a[4], b[2];
};

DEVICE int element(uint32_t word, int e, int bits, bool is_signed) {
  const uint32_t value = (word >> (e * bits)) & ((1u << bits) - 1u);
  const int sign = 1 << (bits - 1);
  return is_signed && (static_cast<int>(value) & sign) ? static_cast<int>(value) - 2 * sign : static_cast<int>(value);
}

template <int BITS, int HALVES, bool A_SIGNED, bool B_SIGNED>
void product_of_lanes(void* const (&lanes)[32]) {
  constexpr int per = 32 / BITS, depth = 4 * per * HALVES;
  emulation::products++;
  static int a[16][depth], b[8][depth];
  for (int lane = 0; lane < 32; lane++) {
    const ProductLane& own = *static_cast<ProductLane*>(lanes[lane]);
    for (int half = 0; half < HALVES; half++)
      for (int e = 0; e < per; e++) {
        const int k = (lane % 4) * per + e + 4 * per * half;
        a[lane / 4][k] = element(own.a[2 * half], e, BITS, A_SIGNED);
        a[lane / 4 + 8][k] = element(own.a[2 * half + 1], e, BITS, A_SIGNED);
        b[lane / 4][k] = element(own.b[half], e, BITS, B_SIGNED);
      }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + 8 * (i / 2), column = (lane % 4) * 2 + i % 2;
      int sum = 0;
      for (int k = 0; k < depth; k++) sum += a[row][k] * b[column][k];
      int& d = static_cast<ProductLane*>(lanes[lane])->d[i];
      d = static_cast<int>(static_cast<uint32_t>(d) + static_cast<uint32_t>(sum));
    }
}

template <bool A_SIGNED, bool B_SIGNED>
DEVICE void multiply_bytes(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ProductLane mine{d, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  static const char instruction = 0;
  emulation::together(&instruction, &mine, product_of_lanes<8, 2, A_SIGNED, B_SIGNED>);
}
template <bool A_SIGNED>
DEVICE void multiply_nibbles(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ProductLane mine{d, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  static const char instruction = 0;
  emulation::together(&instruction, &mine, product_of_lanes<4, 2, A_SIGNED, true>);
}
template <bool A_SIGNED>
DEVICE void multiply_nibbles_half(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  ProductLane mine{d, {a[0], a[1], 0, 0}, {b, 0}};
  static const char instruction = 0;
  emulation::together(&instruction, &mine, product_of_lanes<4, 1, A_SIGNED, true>);
}
