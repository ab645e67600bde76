#define BITDIAL_ISA avx512vnni
#include "floats_body.h"
