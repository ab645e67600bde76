// AVX-512 with VNNI: 16 int32 lanes; one instruction multiplies 64 unsigned bytes with 64 signed ones and adds fours.
#pragma once
#include "zmm.h"

#define BITDIAL_BLOCKS "avx512vnni_blocks.h"

namespace bitdial {
namespace avx512vnni {

enum {
    ROWS = 6,       // pixels of a register tile of the dot kernel
    COLS = 4,       // vectors of outputs of a register tile
    TALL_ROWS = 12,  // pixels of a tile of at most two vectors of outputs; 0: none
    FIP_ROWS = 8,    // the fast inner product's tile
    FIP_COLS = 2,
    HAS_FIP = 1,
    NARROW = 0,     // whether narrow operands gain by dot_narrow
    SATURATES = 1,  // whether store_packed limits
};

static inline void sum_four(const vi (&v)[4], int32_t* to) {
    const vi a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const vi b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    const vi c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1)));
}

// acc + sums of four products unsigned byte x signed byte, exact.
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) { return _mm512_dpbusd_epi32(acc, u, s); }

// As extract, for 64 bytes at once. u = value + zero; for signed values the quotient of u is 128 / 2^s too large, and parity is
// the same, so that rounding to even is. An overflow of u + half saturates, which the limit then hides: limits are below
// 2^(8 - s) for unsigned and 2^(7 - s) for signed values.
#define BITDIAL_EXTRACT_BYTES 1
struct ByteExtraction {
    vi right, half, odd, mask, less, lo, hi, left, keep, offset;
};
BITDIAL_INLINE vi extract_bytes(vi u, const ByteExtraction& a, bool is_signed) {
    const vi odd = _mm512_and_si512(_mm512_multishift_epi64_epi8(a.right, u), a.odd);
    const vi sum_ = _mm512_adds_epu8(_mm512_adds_epu8(u, a.half), odd);
    vi q = _mm512_and_si512(_mm512_multishift_epi64_epi8(a.right, sum_), a.mask);
    if (is_signed)
        q = _mm512_min_epi8(_mm512_max_epi8(_mm512_sub_epi8(q, a.less), a.lo), a.hi);
    else
        q = _mm512_min_epu8(q, a.hi);
    return _mm512_add_epi8(_mm512_and_si512(_mm512_multishift_epi64_epi8(a.left, q), a.keep), a.offset);
}
// clamp(rne(w / 2^s), -limit, limit) of 64 signed bytes.
static inline vi low_weights(vi w, int s, int limit) {
    const vi eight = _mm512_set1_epi64(0x3830282018100800);  // first bit of every byte of eight
    const ByteExtraction a = {_mm512_add_epi8(eight, set_bytes(s)), set_bytes(s > 0 ? (1 << (s - 1)) - 1 : 0), set_bytes(s > 0),
                            set_bytes(255 >> s), set_bytes(128 >> s), set_bytes(-limit), set_bytes(limit), eight,
                            set_bytes(255), zero()};
    return extract_bytes(_mm512_xor_si512(w, set_bytes(128)), a, true);
}

}  // namespace avx512vnni
}  // namespace bitdial

#include "byte_groups.h"
