// The operators without multiply-accumulates, by instruction set.
#pragma once
#include "../simple_ops.h"

namespace bitdial {

// Table of one instruction set by its name in isa.h ("avx2", ...); null if this build has none of that name. Whether the
// processor can run it is the caller's to find out.
const SimpleOps* simple_ops(const char* isa);

}  // namespace bitdial
