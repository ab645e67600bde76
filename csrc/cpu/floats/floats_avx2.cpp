#define BITDIAL_ISA avx2
#include "floats.h"

#include "floats_body.h"
