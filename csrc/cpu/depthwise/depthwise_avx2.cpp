#define BITDIAL_ISA avx2
#include "depthwise.h"

#include "depthwise_body.h"
