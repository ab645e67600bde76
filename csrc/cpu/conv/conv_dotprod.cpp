#define BITDIAL_ISA dotprod
#include "conv_body.h"
