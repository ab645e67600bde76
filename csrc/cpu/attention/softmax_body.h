// Softmax of one row, in the fixed order of float operations that the reference engine has. Rows are padded to SUM_LANES floats with -inf, whose exponential is exactly 0.
#pragma once
#include "pack_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

static constexpr float kFlush = -72.0f, kLog2E = 1.4426950216293335f, kLn2High = 0.693359375f, kLn2Low = -2.1219444e-4f;
static constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
static constexpr float kPolynomial[6] = {1.0f, 0.9999997019767761f, 0.4999914765357971f, 0.1666763871908188f,
                                         0.04189816117286682f, 0.008290272206068039f};
static constexpr float kMinusInfinity = -__builtin_huge_valf();

// exp of x <= 0 within 2.5 units in the last place; 0 below kFlush.
BITDIAL_INLINE vf exp32(vf x) {
    const vf low = set(kFlush), kept = larger(x, low);
    const vf shifted = add(mul(kept, set(kLog2E)), set(kToInteger));
    const vf n = sub(shifted, set(kToInteger));
    const vf r = sub(sub(kept, mul(n, set(kLn2High))), mul(n, set(kLn2Low)));
    vf y = set(kPolynomial[5]);
    for (int k = 4; k >= 0; k--) y = add(mul(y, r), set(kPolynomial[k]));
    return zero_below(float_of(add(bits_of(y), shift_left(bits_of(shifted), 23))), x, low);
}

// x[0, padded) -> exponentials of what is left after the maximum; returns 1 / their sum, 0 where all are 0.
static inline float exponentials(float* x, int32_t padded, float top) {
    const vf m = set(top == kMinusInfinity ? 0.0f : top);
    Sixteen sums = fill<Sixteen>(0.0f);
    for (int32_t j = 0; j < padded; j += SUM_LANES)
        for (int k = 0; k < Sixteen::N; k++) {
            const vf e = exp32(sub(load(x + j + k * LANES), m));
            store(x + j + k * LANES, e);
            sums.v[k] = add(sums.v[k], e);
        }
    const float all = total(sums);
    return all == 0.0f ? 0.0f : 1.0f / all;
}

// ---- softmax of floats in memory -----------------------------------------------------------------------------------------

int64_t softmax_scratch(const SoftmaxArgs& a) { return 4 * rounded_up(a.length, SUM_LANES); }

void softmax(const SoftmaxArgs& a, int64_t row0, int64_t row1, uint8_t* scratch) {
    float* x = reinterpret_cast<float*>(scratch);
    const int32_t length = a.length, padded = static_cast<int32_t>(rounded_up(length, SUM_LANES));
    for (int64_t row = row0; row < row1; row++) {
        const int64_t first = row / a.inner * length * a.inner + row % a.inner;
        if (a.inner == 1)
            __builtin_memcpy(x, a.src + first, 4 * static_cast<uint64_t>(length));
        else
            for (int32_t j = 0; j < length; j++) x[j] = a.src[first + int64_t{j} * a.inner];
        for (int32_t j = length; j < padded; j++) x[j] = kMinusInfinity;
        vf top = set(kMinusInfinity);
        for (int32_t j = 0; j < padded; j += LANES) top = larger(load(x + j), top);
        const vf inverse = set(exponentials(x, padded, max_lanes(top)));
        if (a.bytes) {
            uint8_t* to = a.bytes + row / a.rows_per_sample * a.sample + a.rows[row % a.rows_per_sample];
            for (int32_t j = 0; j < length; j += LANES) {
                const vf p = mul(mul(load(x + j), inverse), set(a.factor));
                const vi q = add(round_even(clamp(p, set(a.lo), set(a.hi))), set(a.zero));
                const int32_t n = length - j < LANES ? length - j : LANES;
                if (a.column == 1) {
                    store_bytes(to + j, q, n);
                } else {
                    uint8_t own[LANES];
                    store_bytes(own, q, LANES);
                    for (int32_t i = 0; i < n; i++) to[(j + i) * a.column] = own[i];
                }
            }
            continue;
        }
        for (int32_t j = 0; j < padded; j += LANES) store(x + j, mul(load(x + j), inverse));
        if (a.inner == 1)
            __builtin_memcpy(a.dst + first, x, 4 * static_cast<uint64_t>(length));
        else
            for (int32_t j = 0; j < length; j++) a.dst[first + int64_t{j} * a.inner] = x[j];
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
