#define BITDIAL_ISA portable
#include "elementwise.h"

#include "arithmetic_body.h"
#include "quantize_body.h"
