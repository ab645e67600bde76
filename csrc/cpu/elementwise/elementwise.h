// Operators that map element to element: quantize, dequantize, table, add, mul, rescale. Arguments and arithmetic are in
// ../simple_ops.h; this page says how memory is walked.
//
//   quantize     q = rne(clamp(x * inverse, lo, hi)); stored byte = q + zero. NaN becomes lo.
//   dequantize   x = float(byte - zero) * scale
//   table        byte = table[byte]
//   add          q = rne(clamp(fl(fl(a * ra) + fl(b * rb)), lo, hi))
//   mul          q = rne(clamp(fl(float(a * b) * m), lo, hi))
//   rescale      q = rne(clamp(fl(v * factor), lo, hi)); with factor 1 the bytes only move by the difference of the zeros
//
// Strides: element (n, y, x, c) of a view lies at data + n * pitch_n + y * pitch_y + x * pitch_x + c. Where pitch_x == c
// in every operand, a row is one run of w * c elements, and where pitch_y == w * pitch_x as well, so are all rows of an
// image: runs are as long as memory allows, so that channel counts that fill no vector cost one tail per run. Otherwise a
// run is the c channels of a pixel. Nothing is read or written outside the elements of the views, margins and channels
// between c and pitch_x included.
//
// Quantizing from planes (src_x == 1, as images and other channels-first tensors come) takes 3 channels by byte shuffles
// and other counts through tiles of 16 channels by kBlock pixels, transposed in registers (../copy/transpose.h);
// dequantizing to planes likewise. Any other strides run one element at a time.
//
// table, add, mul and rescale may run in place (dst == a or src, same strides).
#pragma once
#include "../isa.h"
#include "../simple_ops.h"

namespace bitdial {
#define BITDIAL_DECLARE(isa)                                                          \
    namespace isa {                                                                  \
    int64_t quantize(const QuantizeArgs& args, int32_t row0, int32_t row1);          \
    void dequantize(const DequantizeArgs& args, int32_t row0, int32_t row1);         \
    void table(const TableArgs& args, int32_t row0, int32_t row1);                   \
    void add(const AddArgs& args, int32_t row0, int32_t row1);                       \
    void mul(const MulArgs& args, int32_t row0, int32_t row1);                       \
    void rescale(const RescaleArgs& args, int32_t row0, int32_t row1);               \
    }
BITDIAL_ISA_LIST(BITDIAL_DECLARE)
#undef BITDIAL_DECLARE
}  // namespace bitdial
