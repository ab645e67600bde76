#define BITDIAL_ISA avx512vnni
#include "depthwise.h"

#include "depthwise_body.h"
