#define BITDIAL_ISA avxvnni
#include "conv_body.h"
