// The one vocabulary that kernels are written in: vectors of the instruction set that BITDIAL_ISA names. All of it is static, in a
// namespace of that set: no function may be shared with code for another one.
//
//   vi, vf               a register of LANES int32 numbers, or BYTES bytes; of LANES floats. <set>.h has what is done with them
//   load, store          a register; with a count its first elements only: a load then touches no memory beyond them and
//                        fills with zeros, a store writes nothing beyond them. load<true> and load<false>: which of the two is
//                        known at compile time
//   first(n), part(n, k) mask of the first n <= LANES lanes; of what register k holds of n elements in several
//   clamp(t, lo, hi)     NaN becomes lo; bound: NaN stays
//   Floats, Ints         as many floats or integers as a register has bytes, in order; Sixteen: sixteen floats whatever the set,
//                        for sums in the one order that all engines have. total adds element i + 8 to element i, then i + 4,
//                        i + 2, i + 1; first_of makes all behind the first zero. blocks.h and <set>_blocks.h
//   values(bytes, zero)  float(stored - zero), exact
//   narrow(floats, zero) rne(t) + zero as bytes, for -127 <= t <= 255 and 0 <= rne(t) + zero <= 255. Rounds as the
//                        processor does by default (to nearest, ties to even); nothing here changes that mode
//   watch, any_nonfinite whether any of the floats seen was NaN or infinite
//   Words, gather_words  sums of up to 256 bytes per element in 16 bits, then added to 32-bit ones
//   Taps, multiply_taps  dot products over kTapGroup bytes per element, exact in int32: see depthwise/
#pragma once
#include <cstdint>

// Functions of a few vector instructions must be part of the loop that calls them, or constants and results go through
// memory; compilers' own estimates of size decide otherwise (measured: byte addition 1.6 times slower).
#define BITDIAL_ALWAYS_INLINE __attribute__((always_inline))
#define BITDIAL_INLINE static inline BITDIAL_ALWAYS_INLINE

// <set>.h, which names its blocks.
#define BITDIAL_QUOTED(name) #name
#define BITDIAL_HEADER_OF(isa) BITDIAL_QUOTED(isa.h)
#define BITDIAL_EXPANDED(macro, isa) macro(isa)
#include BITDIAL_EXPANDED(BITDIAL_HEADER_OF, BITDIAL_ISA)

// What only some sets have.
#ifndef BITDIAL_SPLIT
#define BITDIAL_SPLIT 0
#endif
#ifndef BITDIAL_EXTRACT_BYTES
#define BITDIAL_EXTRACT_BYTES 0
#endif

#include "blocks.h"
#include BITDIAL_BLOCKS
#include "sixteen_bytes.h"

#ifndef BITDIAL_TAP_COLUMNS
#define BITDIAL_TAP_COLUMNS 0
#endif
