#define BITDIAL_ISA avx512vnni
#include "arithmetic_body.h"
#include "quantize_body.h"
