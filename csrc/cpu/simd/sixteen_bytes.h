// Work on 16 bytes at once that every instruction set of a processor does alike, with its base instructions or without any.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#define BITDIAL_HAS_SIXTEEN 1
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define BITDIAL_HAS_SIXTEEN 1
#else
#define BITDIAL_HAS_SIXTEEN 0
#endif

namespace bitdial {
namespace BITDIAL_ISA {

// zip: a0 b0 a1 b1 ... of the lower or of the upper halves.
#if defined(__SSE2__)
typedef __m128i SixteenBytes;
BITDIAL_INLINE SixteenBytes load_sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
BITDIAL_INLINE void store_sixteen(uint8_t* p, SixteenBytes a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
BITDIAL_INLINE SixteenBytes all_bytes(int v) { return _mm_set1_epi8(static_cast<char>(v)); }
BITDIAL_INLINE SixteenBytes all_words(int v) { return _mm_set1_epi16(static_cast<int16_t>(v)); }
BITDIAL_INLINE SixteenBytes zip_low(SixteenBytes a, SixteenBytes b) { return _mm_unpacklo_epi8(a, b); }
BITDIAL_INLINE SixteenBytes zip_high(SixteenBytes a, SixteenBytes b) { return _mm_unpackhi_epi8(a, b); }
BITDIAL_INLINE SixteenBytes zip_words_low(SixteenBytes a, SixteenBytes b) { return _mm_unpacklo_epi16(a, b); }
BITDIAL_INLINE SixteenBytes zip_words_high(SixteenBytes a, SixteenBytes b) { return _mm_unpackhi_epi16(a, b); }
BITDIAL_INLINE SixteenBytes either(SixteenBytes a, SixteenBytes b) { return _mm_xor_si128(a, b); }
BITDIAL_INLINE SixteenBytes less_words(SixteenBytes a, SixteenBytes b) { return _mm_sub_epi16(a, b); }
#elif BITDIAL_HAS_SIXTEEN
typedef uint8x16_t SixteenBytes;
BITDIAL_INLINE SixteenBytes of_words(uint16x8_t a) { return vreinterpretq_u8_u16(a); }
BITDIAL_INLINE uint16x8_t words_of(SixteenBytes a) { return vreinterpretq_u16_u8(a); }
BITDIAL_INLINE SixteenBytes load_sixteen(const uint8_t* p) { return vld1q_u8(p); }
BITDIAL_INLINE void store_sixteen(uint8_t* p, SixteenBytes a) { vst1q_u8(p, a); }
BITDIAL_INLINE SixteenBytes all_bytes(int v) { return vdupq_n_u8(static_cast<uint8_t>(v)); }
BITDIAL_INLINE SixteenBytes all_words(int v) { return of_words(vdupq_n_u16(static_cast<uint16_t>(v))); }
BITDIAL_INLINE SixteenBytes zip_low(SixteenBytes a, SixteenBytes b) { return vzip1q_u8(a, b); }
BITDIAL_INLINE SixteenBytes zip_high(SixteenBytes a, SixteenBytes b) { return vzip2q_u8(a, b); }
BITDIAL_INLINE SixteenBytes zip_words_low(SixteenBytes a, SixteenBytes b) { return of_words(vzip1q_u16(words_of(a), words_of(b))); }
BITDIAL_INLINE SixteenBytes zip_words_high(SixteenBytes a, SixteenBytes b) { return of_words(vzip2q_u16(words_of(a), words_of(b))); }
BITDIAL_INLINE SixteenBytes either(SixteenBytes a, SixteenBytes b) { return veorq_u8(a, b); }
BITDIAL_INLINE SixteenBytes less_words(SixteenBytes a, SixteenBytes b) { return of_words(vsubq_u16(words_of(a), words_of(b))); }
#endif

// 16 x 16 bytes: to[j * to_stride + i] = from[i * from_stride + j].
static inline void transpose_tile(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
#if BITDIAL_HAS_SIXTEEN
    SixteenBytes a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load_sixteen(from + i * from_stride);
    // Four perfect shuffles of the 16 registers: row i meets row i + 8.
    for (int i = 0; i < 8; ++i) b[2 * i] = zip_low(a[i], a[i + 8]), b[2 * i + 1] = zip_high(a[i], a[i + 8]);
    for (int i = 0; i < 8; ++i) a[2 * i] = zip_low(b[i], b[i + 8]), a[2 * i + 1] = zip_high(b[i], b[i + 8]);
    for (int i = 0; i < 8; ++i) b[2 * i] = zip_low(a[i], a[i + 8]), b[2 * i + 1] = zip_high(a[i], a[i + 8]);
    for (int i = 0; i < 8; ++i) a[2 * i] = zip_low(b[i], b[i + 8]), a[2 * i + 1] = zip_high(b[i], b[i + 8]);
    for (int i = 0; i < 16; ++i) store_sixteen(to + i * to_stride, a[i]);
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
#if BITDIAL_HAS_SIXTEEN
    const auto row = [&](int64_t t, int32_t at) { return load_sixteen(from + t * inner + at); };
    for (; j + 16 <= columns; j += 16) {
        const SixteenBytes a = row(0, j), b = row(1, j);
        const SixteenBytes low = zip_low(a, b), high = zip_high(a, b);
        if (GROUP == 4) {
            const SixteenBytes c = row(2, j), d = row(3, j), mask = all_bytes(flip ? 128 : 0);
            const SixteenBytes low2 = zip_low(c, d), high2 = zip_high(c, d);
            store_sixteen(to + 4 * j, either(zip_words_low(low, low2), mask));
            store_sixteen(to + 4 * j + 16, either(zip_words_high(low, low2), mask));
            store_sixteen(to + 4 * j + 32, either(zip_words_low(high, high2), mask));
            store_sixteen(to + 4 * j + 48, either(zip_words_high(high, high2), mask));
        } else {
            const SixteenBytes none = all_bytes(0), less = all_words(zero);
            store_sixteen(to + 4 * j, less_words(zip_low(low, none), less));
            store_sixteen(to + 4 * j + 16, less_words(zip_high(low, none), less));
            store_sixteen(to + 4 * j + 32, less_words(zip_low(high, none), less));
            store_sixteen(to + 4 * j + 48, less_words(zip_high(high, none), less));
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
