// Vectors of bytes, floats and integers for one instruction set: what the operators without multiply-accumulates are
// written in. Include it with BITDIAL_ISA defined; everything is static in that set's namespace.
//
//   kBlock                    bytes handled at once; a block of bytes is a block of as many floats or integers, in order
//   load, store               a whole block, or its first `count` elements (0 <= count <= kBlock). A partial load touches
//                             no memory beyond them and fills with zeros; a partial store writes nothing beyond them
//   values(bytes, zero)       float(stored - zero), exact
//   narrow(floats, zero)      rne(t) + zero as bytes, for -127 <= t <= 255 and 0 <= rne(t) + zero <= 255. Rounds as the
//                             processor does by default (to nearest, ties to even); nothing here changes that mode
//   clamp(t, lo, hi)          NaN becomes lo; bound: NaN stays
//   Sixteen, total            sixteen floats whatever the set: sums in the one order that all engines have. total adds
//                             element i + 8 to element i, then i + 4, i + 2, i + 1; first16 makes all behind the first zero
//   watch, any_nonfinite      whether any of the floats seen was NaN or infinite
//   Words, gather_words       sums of up to 256 bytes per element in 16 bits, then added to 32-bit ones
//   Taps, multiply_taps       dot products over kTapGroup bytes per element, exact in int32: see depthwise/
#pragma once

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

namespace bitdial {
namespace BITDIAL_ISA {

// Whole block or part of one, chosen at compile time.
template <bool Full>
static inline BITDIAL_ALWAYS_INLINE Bytes load_bytes(const uint8_t* from, int32_t count) {
    if (Full) return load(from);
    return load(from, count);
}

template <bool Full>
static inline BITDIAL_ALWAYS_INLINE void store_bytes(uint8_t* to, const Bytes& bytes, int32_t count) {
    if (Full) {
        store(to, bytes);
    } else {
        store(to, bytes, count);
    }
}

static inline BITDIAL_ALWAYS_INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
static inline BITDIAL_ALWAYS_INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

}  // namespace BITDIAL_ISA
}  // namespace bitdial
