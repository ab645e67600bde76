#include "../simd/portable.h"
#include "conv_args.h"

#define BITDIAL_FOR_ROWS(X) X(1) X(2)
#define BITDIAL_FOR_FIP_ROWS(X) X(1) X(2)

namespace bitdial {
namespace portable {
#include "epilogue_body.h"
#include "lower_body.h"
#include "conv_body.h"
extern const ConvKernels conv_kernels;
const ConvKernels conv_kernels = {BLOCK, FIP_BLOCK, BYTES, ROWS, true, true, false, false, false, LOWERS_BYTES,
                                  scratch_bytes, units, chunks, run_conv, lower_rows, magnitudes, burn};
}  // namespace portable
}  // namespace bitdial
