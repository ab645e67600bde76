// Products of two activations, softmax, and attention, which is both.
//
//   matmul     acc[i, j] = sum over d of left[i, d] * right[d, j], exact in int32; t = fl(float(acc) * m);
//              8-bit: rne(clamp(t, lo, hi)); float: clamp(t, lo, hi)
//   softmax    over one axis of floats: m = max; e = exp32(fl(x - m)); p = fl(e * fl(1 / sum(e))); then, if wanted,
//              rne(clamp(fl(p * factor), lo, hi)). exp32, the order of the sum and rows of -inf: `softmax_body.h`, and
//              bitdial/engines/reference/ordered_softmax.py, which it equals to the bit
//   attention  scores = fl(float(q k) * m), which meet the terms one after another; softmax over the keys;
//              p to 8 bits; p v as matmul. The scores of a few rows at a time stay in the cache
//
// A unit of work is some rows of one head of one sample; scratch memory is the caller's, `*_scratch` bytes of it. Heads are all
// products of a sample: those of every window, where windows are folded into the batch.
//
// Operands are bytes anywhere: element (n, head, outer, inner) lies at data + n * sample + heads[head] + outer * outer_stride
// + inner * inner_stride; `inner` is the contracted axis, `outer` the row of the left operand or the column of the right one.
// A byte is value + zero; zero is 128 for signed values (-127..127) and 0 for unsigned ones. A table, if not null, replaces
// every byte of an operand by another first. Operands are packed once per unit: on VNNI as bytes, a signed side against
// an unsigned one, whose offset the sum of a row of the left operand takes away again; elsewhere widened to 16 bits.
#pragma once
#include "../tensor.h"

namespace bitdial {

struct ProductOperand {
    const uint8_t* data;
    const int64_t* heads;
    int64_t sample, outer, inner;
    int32_t zero;
    const uint8_t* table;
};

// Element (n, head, row, column) lies at n * sample + heads[head] + row * row_stride + column * column_stride, in elements.
struct ProductOutput {
    uint8_t* data;  // bytes or floats
    const int64_t* heads;
    int64_t sample, row, column;
    bool is_float;
    int32_t zero;
    float m, lo, hi;
};

struct MatMulArgs {
    ProductOperand left, right;
    ProductOutput out;
    int32_t rows, columns, depth;
};

// What becomes of a score t where it meets y: t + y, t * y, t - y, t / y in floats; with y a byte, `value` or t where it is not 0.
enum TermOp : int32_t { TERM_ADD, TERM_MUL, TERM_SUB, TERM_DIV, TERM_FILL, TERM_KEEP };

// Element (n, head, row, column) of y lies at n * sample + heads[head] + row * row_stride + column * column_stride, in elements; a
// stride of 0 broadcasts, and column is 0 or 1.
struct ScoreTerm {
    const uint8_t* data;  // floats, or bytes behind TERM_DIV
    const int64_t* heads;
    int64_t sample, row, column;
    TermOp op;
    float value;
    int64_t item() const { return op > TERM_DIV ? 1 : 4; }
};

struct AttentionArgs {
    ProductOperand q, k, v;
    ProductOutput out;
    int32_t rows, columns, depth, width;  // queries, keys, size of either, size of a value
    float m;
    const ScoreTerm* terms;
    int32_t n_terms;
    float factor, lo, hi;  // of p
};

// Rows of `length` floats, `step` floats apart. Row r = o * inner + i starts at o * length * inner + i, step == inner. Bytes,
// where `bytes` is not null: element j of row r of a sample goes to bytes + n * sample + rows[r] + j * column.
struct SoftmaxArgs {
    const float* src;
    float* dst;
    int32_t length, inner;
    uint8_t* bytes;
    const int64_t* rows;
    int64_t sample, column;
    int32_t rows_per_sample, zero;
    float factor, lo, hi;
};

}  // namespace bitdial
