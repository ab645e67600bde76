#define FLEXIQ_ISA avx512vnni
#include "training_body.h"
