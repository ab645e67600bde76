// The instruction sets, best first. This one list declares every kernel table and orders the choice at run time.
// Adding a set: a line here, one thin file per operation folder, its compiler flags in CMakeLists.txt, a test of the CPU
// in dispatch/dispatch.cpp.
#pragma once

#if defined(__x86_64__)
#define BITDIAL_ISA_LIST(X) X(avx512vnni) X(avx2) X(portable)
#else
#define BITDIAL_ISA_LIST(X) X(portable)
#endif
