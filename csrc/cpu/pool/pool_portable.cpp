#define BITDIAL_ISA portable
#include "pool_body.h"
