#include <cstring>

#include "../copy/copy.h"
#include "../depthwise/depthwise.h"
#include "../elementwise/elementwise.h"
#include "../isa.h"
#include "../pool/pool.h"
#include "simple_ops_table.h"

namespace flexiq {

const SimpleOps* simple_ops(const char* isa) {
    struct Entry {
        const char* name;
        SimpleOps ops;
    };
#define FLEXIQ_ENTRY(isa)                                                                                       \
    {#isa,                                                                                                      \
     {isa::quantize, isa::dequantize, isa::table, isa::add, isa::mul, isa::rescale, isa::max_pool, isa::sum_pool, \
      isa::copy, isa::depthwise}},
    static const Entry entries[] = {FLEXIQ_ISA_LIST(FLEXIQ_ENTRY)};
#undef FLEXIQ_ENTRY
    for (const Entry& entry : entries) {
        if (std::strcmp(entry.name, isa) == 0) return &entry.ops;
    }
    return nullptr;
}

}  // namespace flexiq
