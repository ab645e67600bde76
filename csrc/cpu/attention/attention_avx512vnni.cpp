#define BITDIAL_ISA avx512vnni
#include "attention_body.h"
