#include "../copy/copy.h"
#include "../depthwise/depthwise.h"
#include "../elementwise/elementwise.h"
#include "../isa.h"
#include "../pool/pool.h"
#include "find_ops.h"
#include "simple_ops_table.h"

namespace bitdial {

const SimpleOps* simple_ops(const char* isa) {
#define BITDIAL_ENTRY(isa)                                                                                       \
    {#isa,                                                                                                      \
     {isa::quantize, isa::dequantize, isa::table, isa::add, isa::mul, isa::rescale, isa::max_pool, isa::sum_pool, \
      isa::copy, isa::depthwise}},
    static const OpsOfIsa<SimpleOps> table[] = {BITDIAL_ISA_LIST(BITDIAL_ENTRY)};
#undef BITDIAL_ENTRY
    return find_ops(table, isa);
}

}  // namespace bitdial
