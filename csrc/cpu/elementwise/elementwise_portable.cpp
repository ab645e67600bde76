#define BITDIAL_ISA portable
#include "arithmetic_body.h"
#include "quantize_body.h"
