// No instruction set in particular: 4 int32 lanes, for processors without a path of their own. Correct first.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "vectors.h"

#define BITDIAL_BLOCKS "portable_blocks.h"

namespace bitdial {
namespace portable {

enum {
    ROWS = 2,
    COLS = 2,
    TALL_ROWS = 0,
    FIP_ROWS = 2,
    FIP_COLS = 1,
    HAS_FIP = 1,
    NARROW = 0,
    SATURATES = 0,
};

// Sums of two products of 16-bit numbers.
BITDIAL_INLINE vi dot_words(vi a, vi b) {
#if defined(__SSE2__)
    return reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    int16_t x[2 * LANES], y[2 * LANES];
    store(x, a);
    store(y, b);
    vi r;
    for (int i = 0; i < LANES; i++) r[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return r;
#endif
}
// acc + sums of four products unsigned byte x signed byte, exact: the first and third, the second and fourth.
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) {
    const WordVector x = reinterpret_cast<WordVector>(u), w = reinterpret_cast<WordVector>(s);
    const vi even = reinterpret_cast<vi>(reinterpret_cast<ShortVector>(w << 8) >> 8);
    const vi odd = reinterpret_cast<vi>(reinterpret_cast<ShortVector>(w) >> 8);
    return add(acc, add(dot_words(reinterpret_cast<vi>(x & 255), even), dot_words(reinterpret_cast<vi>(x >> 8), odd)));
}

// The values are within +-255: adding and taking away 1.5 * 2^23 rounds to nearest even (floats are computed as floats; no wider
// arithmetic is in use).
BITDIAL_INLINE vi round_even(vf a) { return __builtin_convertvector((a + 12582912.0f) - 12582912.0f, vi); }
BITDIAL_INLINE vi load_bytes_wide(const uint8_t* p, int n) {
    vi r = zero();
    for (int i = 0; i < n && i < LANES; i++) r[i] = p[i];
    return r;
}
BITDIAL_INLINE void store_bytes(uint8_t* p, vi a, int n) {
    for (int i = 0; i < n && i < LANES; i++) p[i] = static_cast<uint8_t>(a[i]);
}

// Products of two operands that are both known at run time only: GROUP of either per lane, widened to 16 bits once.
enum { GROUP = 2 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    return add(acc, dot_words(left, right));
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) {
    int16_t own[LANES];
    for (int i = 0; i < LANES; i++) own[i] = static_cast<int16_t>(a[i]);
    __builtin_memcpy(p, own, sizeof own);
}

// The first n numbers, 0..255, of N vectors, stored as adjacent bytes.
template <int N, bool SIGNED>
BITDIAL_INLINE void store_packed(uint8_t* p, const vi* q, int n) {
    for (int j = 0; j < N; j++) store_bytes(p + j * LANES, q[j], n - j * LANES);
}

}  // namespace portable
}  // namespace bitdial
