#define BITDIAL_ISA avx512
#include "conv_body.h"
