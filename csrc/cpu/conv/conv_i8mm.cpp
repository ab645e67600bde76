#define BITDIAL_ISA i8mm
#include "conv_body.h"
