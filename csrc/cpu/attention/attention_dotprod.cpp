#define BITDIAL_ISA dotprod
#include "attention_body.h"
