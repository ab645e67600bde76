#define BITDIAL_ISA avx2
#include "copy_body.h"
