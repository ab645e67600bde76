#include "../attention/attention.h"

#include <cstring>

namespace bitdial {

const AttentionOps* attention_ops(const char* isa) {
#define BITDIAL_FIND(name) \
    if (std::strcmp(isa, #name) == 0) return &name::attention_ops;
    BITDIAL_ISA_LIST(BITDIAL_FIND)
#undef BITDIAL_FIND
    return nullptr;
}

}  // namespace bitdial
