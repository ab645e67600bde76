#define BITDIAL_ISA neon
#include "depthwise_body.h"
