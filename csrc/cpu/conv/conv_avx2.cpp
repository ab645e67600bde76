#define BITDIAL_ISA avx2
#include "conv_body.h"
