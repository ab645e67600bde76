// AVX-512 without VNNI (Skylake and Cascade Lake servers): 16 int32 lanes, products as AVX2 makes them.
#pragma once
#include "zmm.h"

#define BITDIAL_BLOCKS "avx512_blocks.h"

namespace bitdial {
namespace avx512 {

enum {
    ROWS = 6,
    COLS = 2,
    TALL_ROWS = 0,
    FIP_ROWS = 4,
    FIP_COLS = 2,
    HAS_FIP = 0,
    NARROW = 1,
    SATURATES = 1,
};

#define BITDIAL_SPLIT 1
// See avx2.h.
BITDIAL_INLINE vi dot_wide(vi acc, vi u, vi even, vi odd) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)), even));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_srli_epi16(u, 8), odd));
}
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) {
    return dot_wide(acc, u, _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8), _mm512_srai_epi16(s, 8));
}
BITDIAL_INLINE vi dot_pairs(vi acc, vi u, vi s) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), _mm512_set1_epi16(1)));
}
BITDIAL_INLINE vi dot_narrow(vi acc, vi u0, vi u1, vi u2, vi u3, const int8_t* w, int64_t stride) {
    const vi a = _mm512_add_epi16(_mm512_maddubs_epi16(u0, load(w)), _mm512_maddubs_epi16(u1, load(w + stride)));
    const vi b = _mm512_add_epi16(_mm512_maddubs_epi16(u2, load(w + 2 * stride)), _mm512_maddubs_epi16(u3, load(w + 3 * stride)));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_add_epi16(a, b), _mm512_set1_epi16(1)));
}

enum { GROUP = 2 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(left, right));
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
}

}  // namespace avx512
}  // namespace bitdial
