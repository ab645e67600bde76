// Pooling over windows of bytes in NHWC order, rows and arithmetic as in ../elementwise/elementwise.h.
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
#include "../tensor.h"

namespace bitdial {

struct MaxPoolArgs {
    ConstByteView src;
    ByteView dst;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct SumPoolArgs {
    ConstByteView src;
    ByteView dst;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int32_t zero_src, zero_dst;
    float factor, lo, hi;
};

}  // namespace bitdial
