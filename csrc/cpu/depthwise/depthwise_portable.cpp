#define FLEXIQ_ISA portable
#include "depthwise.h"

#include "depthwise_body.h"
