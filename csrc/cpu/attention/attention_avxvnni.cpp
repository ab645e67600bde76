#define BITDIAL_ISA avxvnni
#include "attention_body.h"
