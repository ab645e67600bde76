#define BITDIAL_ISA avx512vnni
#include "depthwise_body.h"
