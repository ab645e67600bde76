#define BITDIAL_ISA neon
#include "floats_body.h"
