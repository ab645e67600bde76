#define BITDIAL_ISA avx512vnni
#include "training_body.h"
