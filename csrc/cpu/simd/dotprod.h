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

}  // namespace dotprod
}  // namespace bitdial

#include "byte_groups.h"
