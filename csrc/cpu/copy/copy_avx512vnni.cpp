#define BITDIAL_ISA avx512vnni
#include "copy_body.h"
