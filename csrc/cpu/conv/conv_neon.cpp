#define BITDIAL_ISA neon
#include "conv_body.h"
