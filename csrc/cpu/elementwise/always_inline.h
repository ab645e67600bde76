// Functions of a few vector instructions must be part of the loop that calls them, or constants and results go through
// memory; compilers' own estimates of size decide otherwise (measured: byte addition 1.6 times slower).
#pragma once
#define BITDIAL_ALWAYS_INLINE __attribute__((always_inline))
