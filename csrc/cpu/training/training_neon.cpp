#define BITDIAL_ISA neon
#include "training_body.h"
