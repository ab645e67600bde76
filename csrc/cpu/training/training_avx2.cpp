#define BITDIAL_ISA avx2
#include "training_body.h"
