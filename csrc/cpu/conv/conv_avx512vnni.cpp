#include "../simd/avx512vnni.h"
#include "conv_args.h"

#define BITDIAL_FOR_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define BITDIAL_FOR_FIP_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#define BITDIAL_TALL_ROWS 12
#define BITDIAL_SATURATES

namespace bitdial {
namespace avx512vnni {
#include "epilogue_body.h"
#include "lower_body.h"
#include "conv_body.h"
extern const ConvKernels conv_kernels;
const ConvKernels conv_kernels = {BLOCK, FIP_BLOCK, BYTES, ROWS, true, true, false, false, true, LOWERS_BYTES,
                                  scratch_bytes, units, chunks, run_conv, lower_rows, magnitudes, burn};
}  // namespace avx512vnni
}  // namespace bitdial
