#include <cstring>

#include "../training/training.h"

namespace flexiq {

const TrainingOps* training_ops(const char* isa) {
    struct Entry {
        const char* name;
        TrainingOps ops;
    };
#define FLEXIQ_ENTRY(isa) {#isa, {isa::requantize, isa::requantize_grad, isa::lower, isa::look_up, isa::pass}},
    static const Entry entries[] = {FLEXIQ_ISA_LIST(FLEXIQ_ENTRY)};
#undef FLEXIQ_ENTRY
    for (const Entry& entry : entries) {
        if (std::strcmp(entry.name, isa) == 0) return &entry.ops;
    }
    return nullptr;
}

}  // namespace flexiq
