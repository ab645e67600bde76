#define BITDIAL_ISA neon
#include "copy_body.h"
