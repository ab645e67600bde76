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

}  // namespace avxvnni
}  // namespace bitdial

#include "byte_groups.h"
