#define BITDIAL_ISA avx2
#include "depthwise_body.h"
