#include "../training/training.h"
#include "find_ops.h"

namespace flexiq {

const TrainingOps* training_ops(const char* isa) {
#define FLEXIQ_ENTRY(isa) {#isa, {isa::requantize, isa::requantize_grad, isa::lower, isa::look_up, isa::pass}},
    static const OpsOfIsa<TrainingOps> table[] = {FLEXIQ_ISA_LIST(FLEXIQ_ENTRY)};
#undef FLEXIQ_ENTRY
    return find_ops(table, isa);
}

}  // namespace flexiq
