#define BITDIAL_ISA portable
#include "floats_body.h"
