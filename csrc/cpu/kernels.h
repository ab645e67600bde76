// The two lists that everything else about kernels is made of: the instruction sets, and the kernels that each of them has.
// They are included for declarations, the table of a set, the choice at run time and what Python sees (bindings/module.cpp),
// from where tests and benchmarks take every kernel on every set that the machine runs.
#pragma once
#include <string>
#include <vector>

#include "attention/attention.h"
#include "conv/conv_args.h"
#include "copy/copy.h"
#include "depthwise/depthwise.h"
#include "elementwise/elementwise.h"
#include "floats/floats.h"
#include "pool/pool.h"
#include "training/training.h"

// Best first: name, the set that has the kernels which it has not itself, and what the processor must have. A set has either all
// kernels or those of products alone.
#if defined(__x86_64__)
#if BITDIAL_AVXVNNI  // GCC 11, Clang 12
#define BITDIAL_ISA_AVXVNNI(ISA, HAS) ISA(avxvnni, avx2, HAS("avx2") && HAS("fma") && HAS_AVX_VNNI)
#else
#define BITDIAL_ISA_AVXVNNI(ISA, HAS)
#endif
#define BITDIAL_ISA_LIST(ISA, HAS)                                                                                          \
    ISA(avx512vnni, avx512vnni, HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") &&                 \
                                    HAS("avx512vbmi") && HAS("avx512vnni") && HAS("fma"))                                  \
    BITDIAL_ISA_AVXVNNI(ISA, HAS)                                                                                          \
    ISA(avx512, avx2, HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") && HAS("avx2") && HAS("fma")) \
    ISA(avx2, avx2, HAS("avx2") && HAS("fma"))                                                                             \
    ISA(portable, portable, true)
#elif defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#if BITDIAL_I8MM  // GCC 10, Clang 11
#define BITDIAL_ISA_I8MM(ISA, HAS) ISA(i8mm, neon, HAS("i8mm"))
#else
#define BITDIAL_ISA_I8MM(ISA, HAS)
#endif
#define BITDIAL_ISA_LIST(ISA, HAS) \
    BITDIAL_ISA_I8MM(ISA, HAS) ISA(dotprod, neon, HAS("dotprod")) ISA(neon, neon, true) ISA(portable, portable, true)
#else
#define BITDIAL_ISA_LIST(ISA, HAS) ISA(portable, portable, true)
#endif

// Folder, name, result, parameters. The folder's header says what a kernel computes. Products: what gains by a set's own
// multiplications.
#define BITDIAL_OTHER_KERNELS(KERNEL)                                                                                       \
    KERNEL(elementwise, quantize, int64_t, const QuantizeArgs&, int32_t row0, int32_t row1)                                 \
    KERNEL(elementwise, dequantize, void, const DequantizeArgs&, int32_t row0, int32_t row1)                                \
    KERNEL(elementwise, table, void, const TableArgs&, int32_t row0, int32_t row1)                                          \
    KERNEL(elementwise, add, void, const AddArgs&, int32_t row0, int32_t row1)                                              \
    KERNEL(elementwise, mul, void, const MulArgs&, int32_t row0, int32_t row1)                                              \
    KERNEL(elementwise, rescale, void, const RescaleArgs&, int32_t row0, int32_t row1)                                      \
    KERNEL(pool, max_pool, void, const MaxPoolArgs&, int32_t row0, int32_t row1)                                            \
    KERNEL(pool, sum_pool, void, const SumPoolArgs&, int32_t row0, int32_t row1)                                            \
    KERNEL(copy, copy, void, const CopyArgs&, int32_t row0, int32_t row1)                                                   \
    KERNEL(depthwise, depthwise, void, const DepthwiseArgs&, int32_t row0, int32_t row1)                                    \
    KERNEL(floats, layer_norm, void, const LayerNormArgs&, int32_t row0, int32_t row1)                                      \
    KERNEL(floats, combine, void, const CombineArgs&, int64_t row0, int64_t row1)                                           \
    KERNEL(floats, reduce, void, const ReduceArgs&, int32_t outer0, int32_t outer1)                                         \
    KERNEL(training, requantize, void, const RequantizeArgs&, Types, int64_t row0, int64_t row1)                            \
    KERNEL(training, requantize_grad, void, const RequantizeGradArgs&, Types, int64_t row0, int64_t row1)                   \
    KERNEL(training, extract_floats, void, const ExtractFloatsArgs&, Types, int64_t row0, int64_t row1)                     \
    KERNEL(training, look_up, void, const LookUpArgs&, Types, int64_t row0, int64_t row1)                                   \
    KERNEL(training, pass, void, const PassArgs&, Types, int64_t row0, int64_t row1)
#define BITDIAL_PRODUCT_KERNELS(KERNEL)                                                                                     \
    KERNEL(attention, matmul_scratch, int64_t, const MatMulArgs&)                                                           \
    KERNEL(attention, matmul, void, const MatMulArgs&, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t*)       \
    KERNEL(attention, attention_scratch, int64_t, const AttentionArgs&)                                                     \
    KERNEL(attention, attention, void, const AttentionArgs&, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t*) \
    KERNEL(attention, softmax_scratch, int64_t, const SoftmaxArgs&)                                                         \
    KERNEL(attention, softmax, void, const SoftmaxArgs&, int64_t row0, int64_t row1, uint8_t*)                              \
    KERNEL(conv, facts, Facts, void)                                                                                        \
    KERNEL(conv, conv_scratch, int64_t, const ConvArgs&)                                                                    \
    KERNEL(conv, conv_units, int32_t, const ConvArgs&)                                                                      \
    KERNEL(conv, conv_chunks, int32_t, const ConvArgs&)                                                                     \
    KERNEL(conv, conv, void, const ConvArgs&, int32_t chunk, int32_t block0, int32_t block1, const Scratch&, Counters*)     \
    KERNEL(conv, extract, void, const ExtractArgs&, int32_t row0, int32_t row1)                                             \
    KERNEL(conv, magnitudes, void, const ConstByteView&, int32_t zero, int32_t channel0, int32_t channel1, uint8_t* into)   \
    KERNEL(conv, burn, int64_t, int64_t rounds, int32_t* sink)
#define BITDIAL_KERNEL_LIST(KERNEL) BITDIAL_OTHER_KERNELS(KERNEL) BITDIAL_PRODUCT_KERNELS(KERNEL)

namespace bitdial {

struct Kernels {
#define BITDIAL_FIELD(folder, name, result, ...) result (*name)(__VA_ARGS__);
    BITDIAL_KERNEL_LIST(BITDIAL_FIELD)
#undef BITDIAL_FIELD
};

// Names of the sets that the processor and the operating system support, best first; "portable" is always last.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument if the set is not built in or not supported here.
const Kernels& kernels_of(const std::string& isa);
// Product name of the processor, or "" where it cannot be told.
std::string cpu_name();

}  // namespace bitdial
