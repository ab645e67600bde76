#define BITDIAL_ISA i8mm
#include "attention_body.h"
