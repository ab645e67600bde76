#define BITDIAL_ISA portable
#include "attention_body.h"
