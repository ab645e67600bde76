// Depthwise convolution at 8 bits, exact in int32; arguments in ../simple_ops.h.
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
#include "../isa.h"
#include "../simple_ops.h"

namespace bitdial {
#define BITDIAL_DECLARE(isa)                                                    \
    namespace isa {                                                            \
    void depthwise(const DepthwiseArgs& args, int32_t row0, int32_t row1);     \
    }
BITDIAL_ISA_LIST(BITDIAL_DECLARE)
#undef BITDIAL_DECLARE
}  // namespace bitdial
