// Work on 16 bytes at once that every instruction set does alike, with x86's base instructions or without.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bitdial {
namespace BITDIAL_ISA {

// 16 x 16 bytes: to[j * to_stride + i] = from[i * from_stride + j].
static inline void transpose_tile(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
#if defined(__SSE2__)
    __m128i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
    // Four perfect shuffles of the 16 registers: row i meets row i + 8.
    for (int i = 0; i < 8; ++i) b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]), b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    for (int i = 0; i < 8; ++i) a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]), a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
    for (int i = 0; i < 8; ++i) b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]), b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    for (int i = 0; i < 8; ++i) a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]), a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
    for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), a[i]);
#else
    for (int j = 0; j < 16; ++j) {
        for (int i = 0; i < 16; ++i) to[j * to_stride + i] = from[i * from_stride + j];
    }
#endif
}

// GROUP rows of bytes, `inner` apart, to their groups in turn (less `zero`, or the top bit flipped where groups are bytes), 16 at a
// time. Returns how many are done.
static inline int32_t interleave(const uint8_t* from, int64_t inner, int32_t columns, int32_t zero, bool flip, uint8_t* to) {
    int32_t j = 0;
#if defined(__SSE2__)
    const auto row = [&](int64_t t, int32_t at) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + t * inner + at));
    };
    const auto write = [&](int32_t at, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to + at), v); };
    for (; j + 16 <= columns; j += 16) {
        const __m128i a = row(0, j), b = row(1, j);
        const __m128i low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
        if (GROUP == 4) {
            const __m128i c = row(2, j), d = row(3, j), mask = _mm_set1_epi8(static_cast<char>(flip ? 128 : 0));
            const __m128i low2 = _mm_unpacklo_epi8(c, d), high2 = _mm_unpackhi_epi8(c, d);
            write(4 * j, _mm_xor_si128(_mm_unpacklo_epi16(low, low2), mask));
            write(4 * j + 16, _mm_xor_si128(_mm_unpackhi_epi16(low, low2), mask));
            write(4 * j + 32, _mm_xor_si128(_mm_unpacklo_epi16(high, high2), mask));
            write(4 * j + 48, _mm_xor_si128(_mm_unpackhi_epi16(high, high2), mask));
        } else {
            const __m128i none = _mm_setzero_si128(), less = _mm_set1_epi16(static_cast<int16_t>(zero));
            write(4 * j, _mm_sub_epi16(_mm_unpacklo_epi8(low, none), less));
            write(4 * j + 16, _mm_sub_epi16(_mm_unpackhi_epi8(low, none), less));
            write(4 * j + 32, _mm_sub_epi16(_mm_unpacklo_epi8(high, none), less));
            write(4 * j + 48, _mm_sub_epi16(_mm_unpackhi_epi8(high, none), less));
        }
    }
#else
    static_cast<void>(from), static_cast<void>(inner), static_cast<void>(columns), static_cast<void>(zero);
    static_cast<void>(flip), static_cast<void>(to);
#endif
    return j;
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
