#define BITDIAL_ISA neon
#include "arithmetic_body.h"
#include "quantize_body.h"
