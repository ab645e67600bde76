#define BITDIAL_ISA avx2
#include "copy.h"

#include "copy_body.h"
