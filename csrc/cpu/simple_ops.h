// Operators without multiply-accumulates: their arguments and what they compute. One definition per instruction set, in
// the namespace of that set; `bitdial::simple_ops(isa)` in dispatch/ hands out the table.
//
// All work on rows [row0, row1) of the OUTPUT, where row = sample * out.h + y, so that threads can share a tensor.
// Arithmetic is that of the reference engine, bit for bit: float32, every product and sum rounded once, no fused
// multiply-add; `rne` is rounding to nearest, ties to even; clamping happens in float before rounding.
// A stored byte is value + zero (see tensor.h).
#pragma once
#include "tensor.h"

namespace bitdial {

// float -> 8-bit. Source strides count floats, so that NCHW and row-major sources are read alike.
// q = rne(clamp(x * inverse, lo, hi)). Returns the number of NaN and infinite values met.
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

// Window maximum; positions outside the image do not take part. Stored bytes keep the order of values.
struct MaxPoolArgs {
    ConstByteView src;
    ByteView dst;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Window sum, exact in int32 (positions outside the image count as value 0); t = float(sum) * factor;
// q = rne(clamp(t, lo, hi)). The mean over the whole image is the window that covers it.
struct SumPoolArgs {
    ConstByteView src;
    ByteView dst;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    int32_t zero_src, zero_dst;
    float factor, lo, hi;
};

// Any fixed rearrangement of bytes: destination elements (i0..i5) take src[offset + sum i_k * src_stride[k]]; index i0 is
// the sample. gather, if not null, replaces i_k on axis gather_axis by gather[i_k]. Rows: here [row0, row1) counts samples.
struct CopyArgs {
    const uint8_t* src;
    uint8_t* dst;
    int32_t extent[6];
    int64_t src_stride[6], dst_stride[6];
    int64_t src_offset, dst_offset;
    const int32_t* gather;
    int32_t gather_axis;  // -1 without gather
};

// Depthwise convolution, exact in int32, at 8 bits: one filter per output channel; output channel o reads input channel
// o / multiplicity. acc = sum over taps of (src - zero_src) * weight[tap * out_c + o]; t = float(acc + bias[o]) * m[o];
// residual: t = t + float(r) * residual_factor; q = rne(clamp(t, lo, hi)). Positions outside the image count as 0.
// dst_acc, if not null, receives acc + bias as int32 in NHWC order without margins and nothing else is written.
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
    int32_t* dst_acc;
    int32_t margin_h, margin_w;  // so many rows and columns around every image of src may be read: they hold zero_src
};

struct SimpleOps {
    int64_t (*quantize)(const QuantizeArgs&, int32_t row0, int32_t row1);
    void (*dequantize)(const DequantizeArgs&, int32_t row0, int32_t row1);
    void (*table)(const TableArgs&, int32_t row0, int32_t row1);
    void (*add)(const AddArgs&, int32_t row0, int32_t row1);
    void (*mul)(const MulArgs&, int32_t row0, int32_t row1);
    void (*rescale)(const RescaleArgs&, int32_t row0, int32_t row1);
    void (*max_pool)(const MaxPoolArgs&, int32_t row0, int32_t row1);
    void (*sum_pool)(const SumPoolArgs&, int32_t row0, int32_t row1);
    void (*copy)(const CopyArgs&, int32_t row0, int32_t row1);
    void (*depthwise)(const DepthwiseArgs&, int32_t row0, int32_t row1);
};

}  // namespace bitdial
