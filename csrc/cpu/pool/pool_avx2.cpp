#define BITDIAL_ISA avx2
#include "pool_body.h"
