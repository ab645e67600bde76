#include "../simd/avx2.h"
#include "conv_args.h"

#define BITDIAL_FOR_ROWS(X) X(1) X(2) X(3) X(4)
#define BITDIAL_FOR_FIP_ROWS(X) X(1) X(2) X(3) X(4)
#define BITDIAL_NARROW
#define BITDIAL_SPLIT
#define BITDIAL_SATURATES

namespace bitdial {
namespace avx2 {
#include "epilogue_body.h"
#include "lower_body.h"
#include "conv_body.h"
extern const ConvKernels conv_kernels;
const ConvKernels conv_kernels = {BLOCK, FIP_BLOCK, BYTES, ROWS, false, true, true, true, true, LOWERS_BYTES,
                                  scratch_bytes, units, chunks, run_conv, lower_rows, magnitudes, burn};
}  // namespace avx2
}  // namespace bitdial
