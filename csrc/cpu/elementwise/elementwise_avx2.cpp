#define BITDIAL_ISA avx2
#include "arithmetic_body.h"
#include "quantize_body.h"
