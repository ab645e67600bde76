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

}  // namespace i8mm
}  // namespace bitdial

#include "byte_groups.h"
