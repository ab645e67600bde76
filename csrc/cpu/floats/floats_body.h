// The operators of floats.h. Include it with BITDIAL_ISA defined.
#pragma once
#include "../simd/simd.h"
#include "floats.h"

namespace bitdial {
namespace BITDIAL_ISA {

static inline float square_root(float x) { return __builtin_sqrtf(x); }

BITDIAL_INLINE float sum_of(const float* x, int64_t count) {
    Sixteen lanes = fill<Sixteen>(0.0f);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) lanes = add(lanes, load_block<Sixteen>(x + i));
    if (i < count) lanes = add(lanes, load_block<Sixteen>(x + i, static_cast<int32_t>(count - i)));
    return total(lanes);
}

BITDIAL_INLINE float sum_of_squares(const float* x, int64_t count, float centre) {
    const Sixteen mean = fill<Sixteen>(centre);
    Sixteen lanes = fill<Sixteen>(0.0f);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const Sixteen d = sub(load_block<Sixteen>(x + i), mean);
        lanes = add(lanes, mul(d, d));
    }
    if (i < count) {
        const int32_t rest = static_cast<int32_t>(count - i);
        const Sixteen d = first_of(sub(load_block<Sixteen>(x + i, rest), mean), rest);
        lanes = add(lanes, mul(d, d));
    }
    return total(lanes);
}

// One block of a row, normalized and written.
template <bool Full>
BITDIAL_INLINE void normalize(const LayerNormArgs& a, const float* x, int32_t i, int32_t count,
                                                  const Floats& mean, const Floats& inverse, float* to, uint8_t* bytes) {
    Floats y = mul(sub(load_floats<Full>(x + i, count), mean), inverse);
    if (a.weight != nullptr) y = mul(y, load_floats<Full>(a.weight + i, count));
    if (a.bias != nullptr) y = add(y, load_floats<Full>(a.bias + i, count));
    if (to != nullptr) store<Full>(to + i, y, count);
    if (bytes != nullptr) {
        const Floats t = clamp(mul(y, fill(a.factor)), fill(a.lo), fill(a.hi));
        store<Full>(bytes + i, narrow(t, set_bytes(static_cast<uint8_t>(a.zero))), count);
    }
}

void layer_norm(const LayerNormArgs& a, int32_t row0, int32_t row1) {
    const int32_t columns = a.columns;
    const float n = static_cast<float>(columns);
    for (int32_t row = row0; row < row1; ++row) {
        int64_t source = row;
        if (a.order != nullptr) {
            const int32_t sample = row / a.sample_rows;
            source = static_cast<int64_t>(sample) * a.sample_rows + a.order[row - sample * a.sample_rows];
        }
        const float* x = a.src + source * columns;
        float* to = a.dst == nullptr ? nullptr : a.dst + static_cast<int64_t>(row) * columns;
        uint8_t* bytes = a.bytes == nullptr ? nullptr : a.bytes + static_cast<int64_t>(row) * columns;
        const float centre = sum_of(x, columns) / n;
        const float variance = sum_of_squares(x, columns, centre) / n;
        const Floats mean = fill(centre), inverse = fill(1.0f / square_root(variance + a.eps));
        int32_t i = 0;
        for (; i + BYTES <= columns; i += BYTES) normalize<true>(a, x, i, BYTES, mean, inverse, to, bytes);
        if (i < columns) normalize<false>(a, x, i, columns - i, mean, inverse, to, bytes);
    }
}

struct Add {
    BITDIAL_INLINE Floats apply(const Floats& a, const Floats& b) { return add(a, b); }
};
struct Subtract {
    BITDIAL_INLINE Floats apply(const Floats& a, const Floats& b) { return sub(a, b); }
};
struct Multiply {
    BITDIAL_INLINE Floats apply(const Floats& a, const Floats& b) { return mul(a, b); }
};
struct Divide {
    BITDIAL_INLINE Floats apply(const Floats& a, const Floats& b) { return div(a, b); }
};

// `count` elements `stride` apart, at most a block.
static inline Floats gather(const float* from, int64_t stride, int32_t count) {
    float part[BYTES];
    for (int32_t i = 0; i < BYTES; ++i) part[i] = i < count ? from[i * stride] : 1.0f;
    return load_block<Floats>(part);
}

template <typename Op, int A, int B>  // strides of the operands: 0, 1, or 2 for any other
static inline void combine_run(const CombineArgs& args, const float* a, const float* b, float* to, int64_t length) {
    const int32_t last = args.rank - 1;
    const int64_t step_a = args.stride_a[last], step_b = args.stride_b[last];
    const Floats lo = fill(args.lo), hi = fill(args.hi), one_a = fill(*a), one_b = fill(*b);
    for (int64_t i = 0; i < length; i += BYTES) {
        const int32_t count = length - i < BYTES ? static_cast<int32_t>(length - i) : BYTES;
        const bool full = count == BYTES;
        const Floats x = A == 0 ? one_a : A == 2 ? gather(a + i * step_a, step_a, count) : full ? load_block<Floats>(a + i) : load_block<Floats>(a + i, count);
        const Floats y = B == 0 ? one_b : B == 2 ? gather(b + i * step_b, step_b, count) : full ? load_block<Floats>(b + i) : load_block<Floats>(b + i, count);
        const Floats t = bound(Op::apply(x, y), lo, hi);
        if (full) {
            store(to + i, t);
        } else {
            store(to + i, t, count);
        }
    }
}

template <typename Op>
static void combine_rows(const CombineArgs& args, int64_t row0, int64_t row1) {
    const int32_t last = args.rank - 1;
    const int64_t length = args.extent[last], step_a = args.stride_a[last], step_b = args.stride_b[last];
    int64_t place[kCombineAxes] = {};
    int64_t rest = row0;
    const float *a = args.a, *b = args.b;
    float* to = args.dst;
    for (int32_t k = last - 1; k >= 0; --k) {
        place[k] = rest % args.extent[k];
        rest /= args.extent[k];
        a += place[k] * args.stride_a[k], b += place[k] * args.stride_b[k], to += place[k] * args.stride_dst[k];
    }
    for (int64_t row = row0; row < row1; ++row) {
        if (step_a == 1 && step_b == 1) {
            combine_run<Op, 1, 1>(args, a, b, to, length);
        } else if (step_a == 1 && step_b == 0) {
            combine_run<Op, 1, 0>(args, a, b, to, length);
        } else if (step_a == 0 && step_b == 1) {
            combine_run<Op, 0, 1>(args, a, b, to, length);
        } else {
            combine_run<Op, 2, 2>(args, a, b, to, length);
        }
        for (int32_t k = last - 1; k >= 0; --k) {
            a += args.stride_a[k], b += args.stride_b[k], to += args.stride_dst[k];
            if (++place[k] < args.extent[k]) break;
            a -= args.extent[k] * args.stride_a[k], b -= args.extent[k] * args.stride_b[k];
            to -= args.extent[k] * args.stride_dst[k];
            place[k] = 0;
        }
    }
}

void combine(const CombineArgs& args, int64_t row0, int64_t row1) {
    if (args.op == COMBINE_ADD) combine_rows<Add>(args, row0, row1);
    if (args.op == COMBINE_SUBTRACT) combine_rows<Subtract>(args, row0, row1);
    if (args.op == COMBINE_MULTIPLY) combine_rows<Multiply>(args, row0, row1);
    if (args.op == COMBINE_DIVIDE) combine_rows<Divide>(args, row0, row1);
}

static inline float finish(const ReduceArgs& a, float sum) {
    if (a.divisor != 0.0f) sum = sum / a.divisor;
    return a.root ? square_root(sum) : sum;
}

// Columns of `inner` values: the lanes of every column side by side.
static void reduce_columns(const ReduceArgs& a, const float* x, float* to) {
    for (int64_t first = 0; first < a.inner; first += 16) {
        const int32_t width = a.inner - first < 16 ? static_cast<int32_t>(a.inner - first) : 16;
        float lanes[16][16] = {};
        for (int64_t i = 0; i < a.count; ++i) {
            const float* row = x + i * a.inner + first;
            float* lane = lanes[i % 16];
            if (width == 16) {
                for (int32_t j = 0; j < 16; ++j) lane[j] += a.square ? row[j] * row[j] : row[j];
            } else {
                for (int32_t j = 0; j < width; ++j) lane[j] += a.square ? row[j] * row[j] : row[j];
            }
        }
        for (int32_t half = 8; half > 0; half /= 2) {
            for (int32_t k = 0; k < half; ++k) {
                for (int32_t j = 0; j < 16; ++j) lanes[k][j] += lanes[k + half][j];
            }
        }
        for (int32_t j = 0; j < width; ++j) to[first + j] = finish(a, lanes[0][j]);
    }
}

void reduce(const ReduceArgs& a, int32_t outer0, int32_t outer1) {
    for (int32_t o = outer0; o < outer1; ++o) {
        const float* x = a.src + o * a.count * a.inner;
        if (a.inner != 1) {
            reduce_columns(a, x, a.dst + o * a.inner);
        } else {
            a.dst[o] = finish(a, a.square ? sum_of_squares(x, a.count, 0.0f) : sum_of(x, a.count));
        }
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
