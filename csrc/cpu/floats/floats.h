// Operators on float32 values in the network's own order, one after the other without margins.
//
// Every addition, subtraction, multiplication and division is rounded once, in the order given here, which is that of
// bitdial/engines/reference/ordered.py: results are the same bits on every instruction set. Sums of n values run in 16
// lanes (`Sixteen` in ../simd/simd.h).
//
//   layer_norm   rows of `columns` values: mean = sum / columns; d = x - mean; inverse = 1 / sqrt(sum(d * d) / columns + eps);
//                y = d * inverse * weight + bias, from left to right; q = rne(clamp(y * factor, lo, hi)) into bytes. Target
//                row r of a sample takes row order[r] of that sample. dst or bytes may be null.
//   combine      y = a op b, then bounded to lo..hi (NaN stays NaN). Walks `rank` axes with strides in elements, 0 to repeat;
//                the target's last axis is dense. Rows are all axes but the last.
//   reduce       sums of `count` values `inner` apart; outer x inner results. Squares, divides and takes the root where asked.
#pragma once
#include "../tensor.h"

namespace bitdial {

struct LayerNormArgs {
    const float* src;
    int32_t columns;
    const float *weight, *bias;  // null: left out
    float eps;
    const int32_t* order;  // null: as they come
    int32_t sample_rows;
    float* dst;
    uint8_t* bytes;
    int32_t zero;
    float factor, lo, hi;
};

constexpr int kCombineAxes = 8;
enum CombineOp { COMBINE_ADD, COMBINE_SUBTRACT, COMBINE_MULTIPLY, COMBINE_DIVIDE };
struct CombineArgs {
    CombineOp op;
    const float *a, *b;
    float* dst;
    int32_t rank;
    int64_t extent[kCombineAxes], stride_a[kCombineAxes], stride_b[kCombineAxes], stride_dst[kCombineAxes];
    float lo, hi;
};

struct ReduceArgs {
    const float* src;
    float* dst;
    int64_t count, inner;
    float divisor;  // 0: none
    bool square, root;
};

}  // namespace bitdial
