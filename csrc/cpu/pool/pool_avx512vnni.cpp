#define BITDIAL_ISA avx512vnni
#include "pool.h"

#include "pool_body.h"
