#define BITDIAL_ISA neon
#include "pool_body.h"
