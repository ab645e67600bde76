#define BITDIAL_ISA avx512vnni
#include "copy.h"

#include "copy_body.h"
