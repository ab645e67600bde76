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
static inline __attribute__((always_inline)) vf exp32(vf x) {
    const vf low = set_float(kFlush), kept = larger_float(x, low);
    const vf shifted = add_float(mul(kept, set_float(kLog2E)), set_float(kToInteger));
    const vf n = sub_float(shifted, set_float(kToInteger));
    const vf r = sub_float(sub_float(kept, mul(n, set_float(kLn2High))), mul(n, set_float(kLn2Low)));
    vf y = set_float(kPolynomial[5]);
    for (int k = 4; k >= 0; k--) y = add_float(mul(y, r), set_float(kPolynomial[k]));
    return zero_below(float_of(add(bits_of(y), shift_left(bits_of(shifted), 23))), x, low);
}

// x[0, padded) -> exponentials of what is left after the maximum; returns 1 / their sum, 0 where all are 0.
static inline float exponentials(float* x, int32_t padded, float top) {
    const vf m = set_float(top == kMinusInfinity ? 0.0f : top);
    vf sums[SUM_LANES / LANES];
    for (int k = 0; k < SUM_LANES / LANES; k++) sums[k] = set_float(0.0f);
    for (int32_t j = 0; j < padded; j += SUM_LANES)
        for (int k = 0; k < SUM_LANES / LANES; k++) {
            const vf e = exp32(sub_float(load_float(x + j + k * LANES), m));
            store_float(x + j + k * LANES, e);
            sums[k] = add_float(sums[k], e);
        }
    const float total = sum_halves(sums);
    return total == 0.0f ? 0.0f : 1.0f / total;
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
        vf top = set_float(kMinusInfinity);
        for (int32_t j = 0; j < padded; j += LANES) top = larger_float(load_float(x + j), top);
        const vf inverse = set_float(exponentials(x, padded, max_lanes(top)));
        if (a.bytes) {
            uint8_t* to = a.bytes + row / a.rows_per_sample * a.sample + a.rows[row % a.rows_per_sample];
            for (int32_t j = 0; j < length; j += LANES) {
                const vf p = mul(mul(load_float(x + j), inverse), set_float(a.factor));
                const vi q = add(round_even(limit(p, set_float(a.lo), set_float(a.hi))), set(a.zero));
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
        for (int32_t j = 0; j < padded; j += LANES) store_float(x + j, mul(load_float(x + j), inverse));
        if (a.inner == 1)
            __builtin_memcpy(a.dst + first, x, 4 * static_cast<uint64_t>(length));
        else
            for (int32_t j = 0; j < length; j++) a.dst[first + int64_t{j} * a.inner] = x[j];
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
