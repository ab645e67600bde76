// Products of two operands that are both known at run time only, for sets whose `dot` multiplies bytes at once.
#pragma once

namespace bitdial {
namespace BITDIAL_ISA {

// GROUP of either per lane, as bytes, one side signed and the other unsigned. U: the left one is unsigned.
enum { GROUP = 4 };
template <bool U>
BITDIAL_INLINE vi dot_group(vi acc, vi left, vi right) {
    return U ? dot(acc, left, right) : dot(acc, right, left);
}
BITDIAL_INLINE void store_group(uint8_t* p, vi a) { store_bytes(p, a, LANES); }

}  // namespace BITDIAL_ISA
}  // namespace bitdial
