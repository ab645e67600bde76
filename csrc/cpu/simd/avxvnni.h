// AVX-VNNI: 8 int32 lanes, of processors without AVX-512; one instruction multiplies 32 unsigned bytes with 32 signed ones and adds
// fours.
#pragma once
#include "ymm.h"

namespace bitdial {
namespace avxvnni {

enum {
    ROWS = 6,
    COLS = 2,
    TALL_ROWS = 0,
    FIP_ROWS = 4,
    FIP_COLS = 2,
    HAS_FIP = 0,  // no faster than the direct kernel on Zen 5; believed of Intel, where two of three vector ports multiply
    NARROW = 0,
    SATURATES = 1,
};

// acc + sums of four products unsigned byte x signed byte, exact.
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) { return _mm256_dpbusd_avx_epi32(acc, u, s); }

// Products of two operands that are both known at run time only: GROUP of either per lane, as bytes, one side signed and the
// other unsigned. U: the left one is unsigned.
enum { GROUP = 4 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    return U ? dot(acc, left, right) : dot(acc, right, left);
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) { store_bytes(p, a, LANES); }

}  // namespace avxvnni
}  // namespace bitdial
