#define BITDIAL_ISA neon
#include "attention_body.h"
