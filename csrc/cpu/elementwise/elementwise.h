// Operators that map element to element.
//
// Like pool/, copy/ and depthwise/ they work on rows [row0, row1) of the OUTPUT, where row = sample * out.h + y, so that threads
// can share a tensor. Arithmetic is that of the reference engine, bit for bit: float32, every product and sum rounded once, no
// fused multiply-add; `rne` is rounding to nearest, ties to even; clamping happens in float before rounding. A stored byte is
// value + zero (see tensor.h).
//
// Strides: element (n, y, x, c) of a view lies at data + n * pitch_n + y * pitch_y + x * pitch_x + c. Where pitch_x == c
// in every operand, a row is one run of w * c elements, and where pitch_y == w * pitch_x as well, so are all rows of an
// image: runs are as long as memory allows, so that channel counts that fill no vector cost one tail per run. Otherwise a
// run is the c channels of a pixel. Nothing is read or written outside the elements of the views, margins and channels
// between c and pitch_x included.
//
// Quantizing from planes (src_x == 1, as images and other channels-first tensors come) takes 3 channels by byte shuffles
// and other counts through tiles of 16 channels by BYTES pixels, transposed in registers (../copy/transpose.h);
// dequantizing to planes likewise. Any other strides run one element at a time.
//
// table, add, mul and rescale may run in place (dst == a or src, same strides).
#pragma once
#include "../tensor.h"

namespace bitdial {

// float -> 8-bit. Source strides count floats, so that NCHW and row-major sources are read alike.
// q = rne(clamp(x * inverse, lo, hi)), NaN becomes lo. Returns the number of NaN and infinite values met.
struct QuantizeArgs {
    const float* src;
    int64_t src_n, src_y, src_x, src_c;
    ByteView dst;
    float inverse, lo, hi;
    int32_t zero;
};

// 8-bit -> float: float(q) * scale. Destination strides count floats.
struct DequantizeArgs {
    ConstByteView src;
    int32_t zero;
    float scale;
    float* dst;
    int64_t dst_n, dst_y, dst_x, dst_c;
};

// dst byte = table[src byte]; the table maps stored byte to stored byte.
struct TableArgs {
    ConstByteView src;
    ByteView dst;
    const uint8_t* table;
};

// t = a * ra + b * rb (each product and the sum rounded); q = rne(clamp(t, lo, hi)). A pitch of 0 in `b` broadcasts it
// along that axis; b_channel is 0 where b has one channel, else 1.
struct AddArgs {
    ConstByteView a, b;
    int32_t b_channel;
    int32_t zero_a, zero_b, zero_out;
    float ra, rb, lo, hi;
    ByteView dst;
};

// t = float(a * b) * m, a * b exact in int32; broadcasting as above.
struct MulArgs {
    ConstByteView a, b;
    int32_t b_channel;
    int32_t zero_a, zero_b, zero_out;
    float m, lo, hi;
    ByteView dst;
};

// One input of a concatenation: dst is the slice that it fills. q = rne(clamp(value * factor, lo, hi)), lo and hi integers;
// factor == 1 leaves values as they are but for the clamp (an activation may be fused; zero points may differ).
struct RescaleArgs {
    ConstByteView src;
    int32_t zero_src, zero_dst;
    float factor, lo, hi;
    ByteView dst;
};

}  // namespace bitdial
