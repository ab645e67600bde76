#define BITDIAL_ISA portable
#include "training_body.h"
