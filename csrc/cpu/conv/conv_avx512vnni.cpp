#define BITDIAL_ISA avx512vnni
#include "conv_body.h"
