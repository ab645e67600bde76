// No instruction set in particular: 4 int32 lanes in plain C++, for processors without a path of their own. Correct first.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>

namespace bitdial {
namespace portable {

enum { LANES = 4, BYTES = 16, ROWS = 2, COLS = 2, TALL_ROWS = 0, FIP_ROWS = 2, FIP_COLS = 1, HAS_FIP = 1, NARROW = 0, SATURATES = 0 };

struct vi {
    int32_t v[LANES];
};
struct vf {
    float v[LANES];
};

#define BITDIAL_EACH for (int i = 0; i < LANES; i++)
static inline int32_t wrapped(uint32_t v) { return static_cast<int32_t>(v); }
static inline uint32_t bits(int32_t v) { return static_cast<uint32_t>(v); }

static inline vi set(int32_t v) {
    vi r;
    BITDIAL_EACH r.v[i] = v;
    return r;
}
static inline vi zero() { return set(0); }
static inline vi load(const void* p) {
    vi r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
}
static inline void store(void* p, vi a) { __builtin_memcpy(p, &a, sizeof a); }
static inline vi broadcast4(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return set(v);
}
static inline vi set_bytes(int v) { return set(wrapped(0x01010101u * static_cast<uint8_t>(v))); }
static inline vi add(vi a, vi b) {
    BITDIAL_EACH a.v[i] = wrapped(bits(a.v[i]) + bits(b.v[i]));
    return a;
}
static inline vi sub(vi a, vi b) {
    BITDIAL_EACH a.v[i] = wrapped(bits(a.v[i]) - bits(b.v[i]));
    return a;
}
static inline vi add_bytes(vi a, vi b) {
    uint8_t x[BYTES], y[BYTES];
    __builtin_memcpy(x, &a, BYTES);
    __builtin_memcpy(y, &b, BYTES);
    for (int i = 0; i < BYTES; i++) x[i] = static_cast<uint8_t>(x[i] + y[i]);
    return load(x);
}
static inline vi sub_bytes(vi a, vi b) {
    uint8_t x[BYTES], y[BYTES];
    __builtin_memcpy(x, &a, BYTES);
    __builtin_memcpy(y, &b, BYTES);
    for (int i = 0; i < BYTES; i++) x[i] = static_cast<uint8_t>(x[i] - y[i]);
    return load(x);
}
static inline vi shift_left(vi a, int s) {
    BITDIAL_EACH a.v[i] = wrapped(bits(a.v[i]) << s);
    return a;
}
static inline vi shift_left_each(vi a, vi s) {
    BITDIAL_EACH a.v[i] = wrapped(bits(a.v[i]) << s.v[i]);
    return a;
}
static inline vi shift_right_2(vi a) {
    BITDIAL_EACH a.v[i] >>= 2;
    return a;
}
static inline vi both(vi a, vi b) {
    BITDIAL_EACH a.v[i] &= b.v[i];
    return a;
}
static inline vi swap_fours(vi a) { return vi{{a.v[1], a.v[0], a.v[3], a.v[2]}}; }
static inline int32_t sum(vi a) { return wrapped(bits(a.v[0]) + bits(a.v[1]) + bits(a.v[2]) + bits(a.v[3])); }

static inline void sum_four(const vi (&v)[4], int32_t* to) {
    for (int s = 0; s < 4; s++) to[s] = sum(v[s]);
}

static inline vi dot(vi acc, vi u, vi s) {
    uint8_t x[BYTES];
    int8_t w[BYTES];
    __builtin_memcpy(x, &u, BYTES);
    __builtin_memcpy(w, &s, BYTES);
    BITDIAL_EACH {
        const int32_t d = x[4 * i] * w[4 * i] + x[4 * i + 1] * w[4 * i + 1] + x[4 * i + 2] * w[4 * i + 2] + x[4 * i + 3] * w[4 * i + 3];
        acc.v[i] = wrapped(bits(acc.v[i]) + bits(d));
    }
    return acc;
}

static inline vf to_float(vi a) {
    vf r;
    BITDIAL_EACH r.v[i] = static_cast<float>(a.v[i]);
    return r;
}
// The values are within +-255: adding and taking away 1.5 * 2^23 rounds to nearest even.
static inline vi round_even(vf a) {
    vi r;
    BITDIAL_EACH {
        volatile float shifted = a.v[i] + 12582912.0f;
        r.v[i] = static_cast<int32_t>(shifted - 12582912.0f);
    }
    return r;
}
static inline vf set_float(float v) {
    vf r;
    BITDIAL_EACH r.v[i] = v;
    return r;
}
static inline vf load_float(const float* p) {
    vf r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
}
static inline vf mul(vf a, vf b) {
    BITDIAL_EACH a.v[i] *= b.v[i];
    return a;
}
static inline vf add_float(vf a, vf b) {
    BITDIAL_EACH a.v[i] += b.v[i];
    return a;
}
static inline vf limit(vf a, vf lo, vf hi) {
    BITDIAL_EACH {
        a.v[i] = a.v[i] > lo.v[i] ? a.v[i] : lo.v[i];
        a.v[i] = a.v[i] < hi.v[i] ? a.v[i] : hi.v[i];
    }
    return a;
}
static inline vi load_bytes_wide(const uint8_t* p, int n) {
    vi r = zero();
    for (int i = 0; i < n && i < LANES; i++) r.v[i] = p[i];
    return r;
}
static inline void store_bytes(uint8_t* p, vi a, int n) {
    for (int i = 0; i < n && i < LANES; i++) p[i] = static_cast<uint8_t>(a.v[i]);
}
static inline void store_some(int32_t* p, vi a, int n) {
    for (int i = 0; i < n && i < LANES; i++) p[i] = a.v[i];
}
static inline void store_some_float(float* p, vf a, int n) {
    for (int i = 0; i < n && i < LANES; i++) p[i] = a.v[i];
}
static inline vf load_some_float(const float* p, int n) {
    vf r = set_float(0.0f);
    for (int i = 0; i < n && i < LANES; i++) r.v[i] = p[i];
    return r;
}

// Float operations of softmax.
static inline void store_float(float* p, vf a) { __builtin_memcpy(p, &a, sizeof a); }
static inline vf sub_float(vf a, vf b) {
    BITDIAL_EACH a.v[i] -= b.v[i];
    return a;
}
static inline vf larger_float(vf a, vf b) {
    BITDIAL_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
static inline vi bits_of(vf a) { return load(&a); }
static inline vf float_of(vi a) {
    vf r;
    __builtin_memcpy(&r, &a, sizeof r);
    return r;
}
static inline vf zero_below(vf a, vf x, vf limit_) {
    BITDIAL_EACH a.v[i] = x.v[i] >= limit_.v[i] ? a.v[i] : 0.0f;
    return a;
}
static inline vf first_or(vf a, int n, vf other) {
    BITDIAL_EACH a.v[i] = i < n ? a.v[i] : other.v[i];
    return a;
}
static inline float max_lanes(vf a) {
    float m = a.v[0];
    for (int i = 1; i < LANES; i++) m = a.v[i] > m ? a.v[i] : m;
    return m;
}
// Halves of 16 lanes are added until one number is left.
static inline float sum_halves(const vf (&a)[4]) {
    const vf c = add_float(add_float(a[0], a[2]), add_float(a[1], a[3]));
    return (c.v[0] + c.v[2]) + (c.v[1] + c.v[3]);
}

// Products of two operands that are both known at run time only: GROUP of either per lane, widened to 16 bits once.
enum { GROUP = 2 };
template <bool U>
static inline vi dot_group(vi acc, vi left, vi right) {
    int16_t x[2 * LANES], y[2 * LANES];
    __builtin_memcpy(x, &left, sizeof x);
    __builtin_memcpy(y, &right, sizeof y);
    BITDIAL_EACH acc.v[i] = wrapped(bits(acc.v[i]) + bits(x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]));
    return acc;
}
static inline void store_group(uint8_t* p, vi a) {
    int16_t own[LANES];
    BITDIAL_EACH own[i] = static_cast<int16_t>(a.v[i]);
    __builtin_memcpy(p, own, sizeof own);
}

// The first n numbers, 0..255, of N vectors, stored as adjacent bytes.
template <int N, bool SIGNED>
static inline void store_packed(uint8_t* p, const vi* q, int n) {
    for (int j = 0; j < N; j++) store_bytes(p + j * LANES, q[j], n - j * LANES);
}

// clamp(rne(v / 2^s), lo, hi); shift = s + 1 and half = 2^s - 1. Right shifts of negative values are arithmetic in every
// compiler that C++17 has (and by C++20's letter).
static inline vi extract(vi v, vi shift, vi half, vi lo, vi hi) {
    BITDIAL_EACH {
        const int32_t twice = 2 * v.v[i];
        const int32_t q = (twice + half.v[i] + ((twice >> shift.v[i]) & 1)) >> shift.v[i];
        v.v[i] = q < lo.v[i] ? lo.v[i] : q > hi.v[i] ? hi.v[i] : q;
    }
    return v;
}
// clamp(rne(w / 2^s), -limit, limit) of a vector of signed bytes.
static inline vi low_weights(vi w, int s, int limit_) {
    uint8_t in[BYTES], out[BYTES];
    store(in, w);
    const vi shift = set(s + 1), half = set((1 << s) - 1), lo = set(-limit_), hi = set(limit_), middle = set(128);
    for (int b = 0; b < BYTES; b += LANES) {
        for (int i = 0; i < LANES; i++) in[b + i] = static_cast<uint8_t>(in[b + i] ^ 128);
        store_bytes(out + b, extract(sub(load_bytes_wide(in + b, LANES), middle), shift, half, lo, hi), LANES);
    }
    return load(out);
}

#undef BITDIAL_EACH

}  // namespace portable
}  // namespace bitdial
