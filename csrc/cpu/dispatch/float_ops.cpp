#include "../floats/floats.h"
#include "find_ops.h"

namespace bitdial {

const FloatOps* float_ops(const char* isa) {
#define BITDIAL_ENTRY(isa) {#isa, {isa::layer_norm, isa::combine, isa::reduce}},
    static const OpsOfIsa<FloatOps> table[] = {BITDIAL_ISA_LIST(BITDIAL_ENTRY)};
#undef BITDIAL_ENTRY
    return find_ops(table, isa);
}

}  // namespace bitdial
