#define BITDIAL_ISA avx2
#include "floats_body.h"
