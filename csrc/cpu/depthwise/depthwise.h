// Depthwise convolution at 8 bits, exact in int32; rows as in ../elementwise/elementwise.h. One filter per output channel.
//
//   acc(y, x, o) = sum over taps t inside the image of (in(t, o / multiplicity) - zero_src) * weight[t * out_c + o]
//   t = fl(float(acc + bias[o]) * m[o]); with a residual t = fl(t + fl(float(r - zero_residual) * residual_factor));
//   q = rne(clamp(t, lo, hi)); or acc + bias as int32
//
// A vector holds adjacent channels. For a block of channels the weights of all taps are packed once, kTapGroup taps
// interleaved as the instruction set's dot product wants them; then rows and pixels run, each summing stored bytes times
// weights. A tap outside the image reads a block filled with zero_src, so that every pixel's sum is off by the same
// zero_src * sum of weights, which is taken from the bias beforehand. Source pixels are pitch_x bytes apart, the taps of a
// window pitch_x * dilation_w and pitch_y * dilation_h.
//
// multiplicity > 1 and windows of more than kMaxTaps taps take a plain loop per output.
// dst may share memory with the residual (same strides), not with src. Nothing outside the views' elements and src's margin is
// touched.
// Windows of 3 x 3 and 5 x 5 whose padding lies in the margins go by columns where the set has that: columns_body.h.
#pragma once
#include "../tensor.h"

namespace bitdial {

struct DepthwiseArgs {
    ConstByteView src;
    ByteView dst;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int32_t multiplicity;
    const int8_t* weight;
    const int32_t* bias;
    const float* m;
    int32_t zero_src, zero_dst;
    float lo, hi;
    const uint8_t* residual;  // null, or laid out as `residual_view`
    ConstByteView residual_view;
    int32_t zero_residual;
    float residual_factor;
    int32_t* dst_acc;  // if not null, receives acc + bias in NHWC order without margins, and nothing else is written
    int32_t margin_h, margin_w;  // so many rows and columns around every image of src may be read: they hold zero_src
};

}  // namespace bitdial
