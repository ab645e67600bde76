#define BITDIAL_ISA portable
#include "copy.h"

#include "copy_body.h"
