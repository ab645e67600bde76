// Words of 128-bit registers, in the vector types that GCC and Clang offer on every target; the sets that have them say in files of
// their own how they multiply and convert.
#pragma once
#include <cstdint>

namespace bitdial {
namespace BITDIAL_ISA {

typedef int32_t vi __attribute__((vector_size(16)));
typedef float vf __attribute__((vector_size(16)));
typedef uint8_t ByteVector __attribute__((vector_size(16)));
typedef uint16_t WordVector __attribute__((vector_size(16)));
typedef int16_t ShortVector __attribute__((vector_size(16)));
typedef uint32_t BitVector __attribute__((vector_size(16)));
struct Mask {
    int n;  // the first so many lanes, at most LANES; below 0 as 0
};

enum { LANES = 4, BYTES = 16 };

BITDIAL_INLINE vi signed_of(BitVector a) { return reinterpret_cast<vi>(a); }
BITDIAL_INLINE BitVector bits(vi a) { return reinterpret_cast<BitVector>(a); }
BITDIAL_INLINE ByteVector bytes_of(vi a) { return reinterpret_cast<ByteVector>(a); }

BITDIAL_INLINE vi set(int32_t v) { return vi{v, v, v, v}; }
BITDIAL_INLINE vf set(float v) { return vf{v, v, v, v}; }
BITDIAL_INLINE vi set_bytes(int v) { return reinterpret_cast<vi>(ByteVector{} + static_cast<uint8_t>(v)); }
BITDIAL_INLINE vi zero() { return vi{}; }
BITDIAL_INLINE vi load(const void* p) {
    vi r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
}
BITDIAL_INLINE vf load(const float* p) {
    vf r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
}
BITDIAL_INLINE void store(void* p, vi a) { __builtin_memcpy(p, &a, sizeof a); }
BITDIAL_INLINE void store(float* p, vf a) { __builtin_memcpy(p, &a, sizeof a); }
BITDIAL_INLINE vi broadcast4(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return set(v);
}
BITDIAL_INLINE vi add(vi a, vi b) { return signed_of(bits(a) + bits(b)); }  // wraps
BITDIAL_INLINE vi sub(vi a, vi b) { return signed_of(bits(a) - bits(b)); }
BITDIAL_INLINE vi add_bytes(vi a, vi b) { return reinterpret_cast<vi>(bytes_of(a) + bytes_of(b)); }
BITDIAL_INLINE vi sub_bytes(vi a, vi b) { return reinterpret_cast<vi>(bytes_of(a) - bytes_of(b)); }
BITDIAL_INLINE vi larger_bytes(vi a, vi b) {
    const ByteVector x = bytes_of(a), y = bytes_of(b);
    return reinterpret_cast<vi>(x > y ? x : y);
}
BITDIAL_INLINE vi smaller_bytes(vi a, vi b) {
    const ByteVector x = bytes_of(a), y = bytes_of(b);
    return reinterpret_cast<vi>(x < y ? x : y);
}
BITDIAL_INLINE vi larger(vi a, vi b) { return a > b ? a : b; }
BITDIAL_INLINE vi smaller(vi a, vi b) { return a < b ? a : b; }
BITDIAL_INLINE vi shift_left(vi a, int s) { return signed_of(bits(a) << static_cast<uint32_t>(s)); }
BITDIAL_INLINE vi shift_left_each(vi a, vi s) { return signed_of(bits(a) << bits(s)); }
BITDIAL_INLINE vi shift_right_2(vi a) { return a >> 2; }
BITDIAL_INLINE vi both(vi a, vi b) { return a & b; }
BITDIAL_INLINE vi swap_fours(vi a) { return vi{a[1], a[0], a[3], a[2]}; }
BITDIAL_INLINE int32_t sum(vi a) {
    const BitVector b = bits(a);
    return static_cast<int32_t>(b[0] + b[1] + b[2] + b[3]);
}

BITDIAL_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
BITDIAL_INLINE vf mul(vf a, vf b) { return a * b; }
BITDIAL_INLINE vf add(vf a, vf b) { return a + b; }
BITDIAL_INLINE vf sub(vf a, vf b) { return a - b; }
BITDIAL_INLINE vf div(vf a, vf b) { return a / b; }
BITDIAL_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
BITDIAL_INLINE vf clamp(vf a, vf lo, vf hi) {
    const vf raised = larger(a, lo);
    return raised < hi ? raised : hi;
}
BITDIAL_INLINE vf bound(vf a, vf lo, vf hi) {
    const vf raised = a < lo ? lo : a;
    return raised > hi ? hi : raised;
}

// The first elements of an array, the rest zero.
template <typename V, typename T>
BITDIAL_INLINE V load_part(const T* from, int n) {
    V r;
    if (n >= static_cast<int>(sizeof(V) / sizeof(T))) {
        __builtin_memcpy(&r, from, sizeof r);
        return r;
    }
    T own[sizeof(V) / sizeof(T)] = {};
    for (int i = 0; i < n; i++) own[i] = from[i];
    __builtin_memcpy(&r, own, sizeof r);
    return r;
}
template <typename V, typename T>
BITDIAL_INLINE void store_part(T* to, V a, int n) {
    if (n >= static_cast<int>(sizeof(V) / sizeof(T))) {
        __builtin_memcpy(to, &a, sizeof a);
        return;
    }
    T own[sizeof(V) / sizeof(T)];
    __builtin_memcpy(own, &a, sizeof own);
    for (int i = 0; i < n; i++) to[i] = own[i];
}
BITDIAL_INLINE Mask first(int n) { return {n < LANES ? n : LANES}; }
BITDIAL_INLINE Mask part(int n, int k) { return first(n - LANES * k); }
BITDIAL_INLINE vi load(const uint8_t* p, int n) { return load_part<vi>(p, n); }
BITDIAL_INLINE vi load(const int32_t* p, Mask some) { return load_part<vi>(p, some.n); }
BITDIAL_INLINE vf load(const float* p, Mask some) { return load_part<vf>(p, some.n); }
BITDIAL_INLINE void store(uint8_t* p, vi a, int n) { store_part(p, a, n); }
BITDIAL_INLINE void store(int32_t* p, vi a, Mask some) { store_part(p, a, some.n); }
BITDIAL_INLINE void store(float* p, vf a, Mask some) { store_part(p, a, some.n); }
// Of softmax.
BITDIAL_INLINE vi bits_of(vf a) { return reinterpret_cast<vi>(a); }
BITDIAL_INLINE vf float_of(vi a) { return reinterpret_cast<vf>(a); }
BITDIAL_INLINE vf zero_below(vf a, vf x, vf limit) { return x >= limit ? a : vf{}; }
BITDIAL_INLINE vf first_or(vf a, Mask some, vf other) { return vi{0, 1, 2, 3} < some.n ? a : other; }
BITDIAL_INLINE float max_lanes(vf a) {
    float m = a[0];
    for (int i = 1; i < LANES; i++) m = a[i] > m ? a[i] : m;
    return m;
}
// Halves of 16 lanes are added until one number is left.
BITDIAL_INLINE float total(const vf (&a)[4]) {
    const vf c = (a[0] + a[2]) + (a[1] + a[3]);
    return (c[0] + c[2]) + (c[1] + c[3]);
}

// clamp(rne(v / 2^s), lo, hi); shift = s + 1 and half = 2^s - 1. Right shifts of negative values are arithmetic in every
// compiler that C++17 has (and by C++20's letter).
BITDIAL_INLINE vi extract(vi v, vi shift, vi half, vi lo, vi hi) {
    const vi twice = v + v;
    return smaller(larger((twice + half + ((twice >> shift) & 1)) >> shift, lo), hi);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
