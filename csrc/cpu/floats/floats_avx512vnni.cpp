#define BITDIAL_ISA avx512vnni
#include "floats.h"

#include "floats_body.h"
