// Words of ARM's 128-bit registers beyond those of vectors.h, in terms of NEON; the sets say in files of their own how they multiply.
#pragma once
#include <arm_neon.h>

#include "vectors.h"

#define BITDIAL_BLOCKS "arm_blocks.h"

namespace bitdial {
namespace BITDIAL_ISA {

enum {
    ROWS = 4,
    COLS = 4,
    TALL_ROWS = 0,
    FIP_ROWS = 4,
    FIP_COLS = 2,
    HAS_FIP = 0,
    NARROW = 0,
    SATURATES = 1,
};

// Out of int32's range the nearest number within it; NaN gives 0.
BITDIAL_INLINE vi round_even(vf a) { return reinterpret_cast<vi>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(a))); }

BITDIAL_INLINE vi load_bytes_wide(const uint8_t* p, int n) {
    uint32_t v = 0;
    if (n >= 4)
        __builtin_memcpy(&v, p, 4);
    else
        for (int i = 0; i < n; i++) v |= static_cast<uint32_t>(p[i]) << (8 * i);
    return reinterpret_cast<vi>(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(v)))));
}
// The low bytes of the four lanes.
BITDIAL_INLINE uint32_t low_bytes_of(vi a) {
    const uint16x4_t words = vmovn_u32(reinterpret_cast<uint32x4_t>(a));
    return vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
}
BITDIAL_INLINE void store_bytes(uint8_t* p, vi a, int n) {
    const uint32_t v = low_bytes_of(a);
    if (n >= 4)
        __builtin_memcpy(p, &v, 4);
    else
        for (int i = 0; i < n; i++) p[i] = static_cast<uint8_t>(v >> (8 * i));
}

BITDIAL_INLINE int16x8_t limited_words(vi a, vi b) {
    return vcombine_s16(vqmovn_s32(reinterpret_cast<int32x4_t>(a)), vqmovn_s32(reinterpret_cast<int32x4_t>(b)));
}
// The first n <= 4 N numbers of N vectors, limited to 0..255 (SIGNED: to -127..127, plus 128) and stored as adjacent bytes.
template <int N, bool SIGNED>
static inline void store_packed(uint8_t* p, const vi* q, int n) {
    static_assert(N >= 1 && N <= 4, "one to four vectors");
    const int16x8_t low = limited_words(q[0], q[N > 1]), high = N > 2 ? limited_words(q[2 % N], q[N - 1]) : low;
    uint8x16_t bytes;
    if (SIGNED) {
        const int8x16_t limited = vmaxq_s8(vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)), vdupq_n_s8(-127));
        bytes = veorq_u8(vreinterpretq_u8_s8(limited), vdupq_n_u8(128));
    } else {
        bytes = vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
    }
    store_part(p, reinterpret_cast<vi>(bytes), n < 4 * N ? n : 4 * N);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
