#include "../training/training.h"
#include "find_ops.h"

namespace bitdial {

const TrainingOps* training_ops(const char* isa) {
#define BITDIAL_ENTRY(isa) {#isa, {isa::requantize, isa::requantize_grad, isa::lower, isa::look_up, isa::pass}},
    static const OpsOfIsa<TrainingOps> table[] = {BITDIAL_ISA_LIST(BITDIAL_ENTRY)};
#undef BITDIAL_ENTRY
    return find_ops(table, isa);
}

}  // namespace bitdial
