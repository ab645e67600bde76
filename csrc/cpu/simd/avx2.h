// AVX2 without VNNI: 8 int32 lanes. An exact product of full bytes widens them to 16 bits: four instructions for 32 products
// and the widening. Where sums of two products fit 16 bits it takes three (`dot_pairs`), where sums of eight fit, two.
#pragma once
#include "ymm.h"

namespace bitdial {
namespace avx2 {

enum {
    ROWS = 4,
    COLS = 2,
    TALL_ROWS = 0,
    FIP_ROWS = 4,
    FIP_COLS = 2,
    HAS_FIP = 0,
    NARROW = 1,
    SATURATES = 1,
};

#define BITDIAL_SPLIT 1
// acc + sums of four products unsigned byte x signed byte, exact. dot_wide: the weights are given as 16-bit numbers, the first
// and third of every four, and the second and fourth.
BITDIAL_INLINE vi dot_wide(vi acc, vi u, vi even, vi odd) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_srli_epi16(u, 8), odd));
}
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) {
    return dot_wide(acc, u, _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), _mm256_srai_epi16(s, 8));
}
// The same where the caller proves that the sums of products 1 + 2 and 3 + 4 fit 16 bits.
BITDIAL_INLINE vi dot_pairs(vi acc, vi u, vi s) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
// acc + sums of sixteen products u * s, u unsigned; the caller proves that eight products fit 16 bits.
BITDIAL_INLINE vi dot_narrow(vi acc, vi u0, vi u1, vi u2, vi u3, const int8_t* w, int64_t stride) {
    const vi a = _mm256_add_epi16(_mm256_maddubs_epi16(u0, load(w)), _mm256_maddubs_epi16(u1, load(w + stride)));
    const vi b = _mm256_add_epi16(_mm256_maddubs_epi16(u2, load(w + 2 * stride)), _mm256_maddubs_epi16(u3, load(w + 3 * stride)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1)));
}

// Products of two operands that are both known at run time only: GROUP of either per lane, widened to 16 bits once, which is
// exact for all bytes and no slower than taking signs apart.
enum { GROUP = 2 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(left, right));
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}

}  // namespace avx2
}  // namespace bitdial
