#define BITDIAL_ISA avx2
#include "attention_body.h"
