#define BITDIAL_ISA portable
#include "copy_body.h"
