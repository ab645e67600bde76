#define BITDIAL_ISA portable
#include "depthwise.h"

#include "depthwise_body.h"
