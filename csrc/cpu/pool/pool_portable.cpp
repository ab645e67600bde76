#define BITDIAL_ISA portable
#include "pool.h"

#include "pool_body.h"
