// C interface to the tables of operators without multiply-accumulates, for ctypes: see simple_support.py.
#include "dispatch/simple_ops_table.h"
#include "isa.h"

#include <cstring>

using namespace bitdial;

extern "C" {

// Names of the instruction sets of this build, each followed by a space.
const char* shim_isas() {
#define BITDIAL_NAME(isa) #isa " "
    return BITDIAL_ISA_LIST(BITDIAL_NAME);
#undef BITDIAL_NAME
}

// Whether this processor runs an instruction set of the build.
int shim_supported(const char* isa) {
    if (simple_ops(isa) == nullptr) return 0;
#if defined(__x86_64__)
    if (std::strcmp(isa, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (std::strcmp(isa, "avx512vnni") == 0) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("fma");
    }
#endif
    return std::strcmp(isa, "portable") == 0;
}

#define BITDIAL_EXPORT(op, Args)                                                                     \
    void shim_##op(const char* isa, const Args* args, int32_t row0, int32_t row1, int64_t* result) { \
        call(simple_ops(isa)->op, *args, row0, row1, result);                                        \
    }                                                                                                \
    int64_t shim_sizeof_##op() { return sizeof(Args); }

}  // extern "C"

namespace {

template <typename Args>
void call(void (*op)(const Args&, int32_t, int32_t), const Args& args, int32_t row0, int32_t row1, int64_t* result) {
    op(args, row0, row1);
    *result = 0;
}

template <typename Args>
void call(int64_t (*op)(const Args&, int32_t, int32_t), const Args& args, int32_t row0, int32_t row1, int64_t* result) {
    *result = op(args, row0, row1);
}

}  // namespace

extern "C" {
BITDIAL_EXPORT(quantize, QuantizeArgs)
BITDIAL_EXPORT(dequantize, DequantizeArgs)
BITDIAL_EXPORT(table, TableArgs)
BITDIAL_EXPORT(add, AddArgs)
BITDIAL_EXPORT(mul, MulArgs)
BITDIAL_EXPORT(rescale, RescaleArgs)
BITDIAL_EXPORT(max_pool, MaxPoolArgs)
BITDIAL_EXPORT(sum_pool, SumPoolArgs)
BITDIAL_EXPORT(copy, CopyArgs)
BITDIAL_EXPORT(depthwise, DepthwiseArgs)
}
