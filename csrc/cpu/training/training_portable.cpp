#define FLEXIQ_ISA portable
#include "training_body.h"
