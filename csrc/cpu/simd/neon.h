// ARM's NEON as every 64-bit processor has it. A byte times a signed byte fits 16 bits; pairs are then added to 32.
#pragma once
#include "arm.h"

namespace bitdial {
namespace neon {

// acc + sums of four products unsigned byte x signed byte, exact.
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) {
    const uint8x16_t x = reinterpret_cast<uint8x16_t>(u);
    const int8x16_t w = reinterpret_cast<int8x16_t>(s);
    const int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vmovl_s8(vget_low_s8(w)));
    const int16x8_t high = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(x))), vmovl_s8(vget_high_s8(w)));
    return add(acc, reinterpret_cast<vi>(vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high))));
}

// Products of two operands that are both known at run time only: GROUP of either per lane, widened to 16 bits once.
enum { GROUP = 2 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    const int16x8_t a = reinterpret_cast<int16x8_t>(left), b = reinterpret_cast<int16x8_t>(right);
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_s16(vget_high_s16(a), vget_high_s16(b));
    return add(acc, reinterpret_cast<vi>(vpaddq_s32(low, high)));
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) {
    const int16x4_t words = vmovn_s32(reinterpret_cast<int32x4_t>(a));
    __builtin_memcpy(p, &words, sizeof words);
}

}  // namespace neon
}  // namespace bitdial
