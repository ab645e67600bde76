// ARM's dot products of bytes of one kind, signed or unsigned (optional from ARMv8.2 on). Mixed ones: s + 128 is unsigned, and what
// that adds depends on u alone, so that a register tile computes it once a row.
#pragma once
#include "arm.h"

namespace bitdial {
namespace dotprod {

// acc + sums of four products unsigned byte x signed byte, exact: sums on the way may wrap.
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) {
    const uint8x16_t x = reinterpret_cast<uint8x16_t>(u), top = vdupq_n_u8(128);
    const uint32x4_t above = vdotq_u32(vdupq_n_u32(0), x, top);
    const uint32x4_t sums = vdotq_u32(reinterpret_cast<uint32x4_t>(acc), x, veorq_u8(reinterpret_cast<uint8x16_t>(s), top));
    return reinterpret_cast<vi>(vsubq_u32(sums, above));
}

// Products of two operands that are both known at run time only: GROUP of either per lane, as bytes, one side signed and the
// other unsigned. U: the left one is unsigned.
enum { GROUP = 4 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    return U ? dot(acc, left, right) : dot(acc, right, left);
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) { store_bytes(p, a, LANES); }

}  // namespace dotprod
}  // namespace bitdial
