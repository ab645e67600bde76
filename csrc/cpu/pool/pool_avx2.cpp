#define BITDIAL_ISA avx2
#include "pool.h"

#include "pool_body.h"
