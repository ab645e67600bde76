// ARM's mixed dot product, unsigned bytes with signed ones (of the extension I8MM, optional from ARMv8.2 on).
#pragma once
#include "arm.h"

namespace bitdial {
namespace i8mm {

// acc + sums of four products unsigned byte x signed byte, exact.
BITDIAL_INLINE vi dot(vi acc, vi u, vi s) {
    return reinterpret_cast<vi>(
        vusdotq_s32(reinterpret_cast<int32x4_t>(acc), reinterpret_cast<uint8x16_t>(u), reinterpret_cast<int8x16_t>(s)));
}

// Products of two operands that are both known at run time only: GROUP of either per lane, as bytes, one side signed and the
// other unsigned. U: the left one is unsigned.
enum { GROUP = 4 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    return U ? dot(acc, left, right) : dot(acc, right, left);
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) { store_bytes(p, a, LANES); }

}  // namespace i8mm
}  // namespace bitdial
