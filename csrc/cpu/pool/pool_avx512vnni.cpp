#define BITDIAL_ISA avx512vnni
#include "pool_body.h"
