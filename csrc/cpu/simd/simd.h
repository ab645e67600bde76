// The vectors of the instruction set that BITDIAL_ISA names. All in them is static, in a namespace of that set: no function may be
// shared with code for another one.
#pragma once
#include "../elementwise/always_inline.h"

#define BITDIAL_HEADER_OF(isa) BITDIAL_QUOTED(isa.h)
#define BITDIAL_QUOTED(name) #name
#include BITDIAL_HEADER_OF(BITDIAL_ISA)

// What only some sets have.
#ifndef BITDIAL_SPLIT
#define BITDIAL_SPLIT 0
#endif
#ifndef BITDIAL_EXTRACT_BYTES
#define BITDIAL_EXTRACT_BYTES 0
#endif

namespace bitdial {
namespace BITDIAL_ISA {

// body(Count<n>()) for 1 <= n <= MOST: sizes of register tiles are known at compile time.
template <int N>
struct Count {
    enum { value = N };
};
template <int MOST, typename Body>
static inline BITDIAL_ALWAYS_INLINE void with_count(int n, const Body& body) {
    if constexpr (MOST > 1) {
        if (n < MOST) return with_count<MOST - 1>(n, body);
    }
    body(Count<MOST>());
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
