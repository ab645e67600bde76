// Pooling over windows of bytes in NHWC order; arguments in ../simple_ops.h.
//
//   max_pool    out(y, x, c) = max over taps (i, j) inside the image of in(y * stride_h - pad_h + i * dilation_h, ...)
//               Bytes keep the order of values, so zeros play no part. A window with no tap inside gives byte 0: no value,
//               and nothing that a network of the graph's operators should ask for.
//   sum_pool    s = sum over taps inside the image of (byte - zero_src), exact in int32;
//               q = rne(clamp(fl(float(s) * factor), lo, hi)). A kernel that covers the image makes it a mean.
//
// A vector holds adjacent channels of one pixel. Channel blocks are the outer loop within a pixel; taps of a window are
// pitch_x * dilation_w and pitch_y * dilation_h bytes apart. Sums run in 16 bits for up to 256 taps (256 * 255 < 2^16).
// dst must not overlap src. Nothing outside the views' elements is read or written.
#pragma once
#include "../isa.h"
#include "../simple_ops.h"

namespace bitdial {
#define BITDIAL_DECLARE(isa)                                                 \
    namespace isa {                                                         \
    void max_pool(const MaxPoolArgs& args, int32_t row0, int32_t row1);     \
    void sum_pool(const SumPoolArgs& args, int32_t row0, int32_t row1);     \
    }
BITDIAL_ISA_LIST(BITDIAL_DECLARE)
#undef BITDIAL_DECLARE
}  // namespace bitdial
