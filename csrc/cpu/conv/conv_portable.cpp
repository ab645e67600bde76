#define BITDIAL_ISA portable
#include "conv_body.h"
