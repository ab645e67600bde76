#define BITDIAL_ISA avx512
#include "attention_body.h"
