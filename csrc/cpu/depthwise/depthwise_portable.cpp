#define BITDIAL_ISA portable
#include "depthwise_body.h"
