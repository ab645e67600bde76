#define BITDIAL_ISA portable
#include "floats.h"

#include "floats_body.h"
