// Element-wise steps of training with rounding, each one pass over memory: what takes torch five to ten passes.
//
// Tensors are dense rows of `channels` elements, float32 or bfloat16 (its upper 16 bits); integers are held in either.
// `inside` is one byte per element: 1 where the gradient passes (nothing was clipped). Arithmetic is float32, every product
// and sum rounded once, no fused multiply-add; rne is rounding to nearest, ties to even. NaN stays NaN.
// All work on rows [row0, row1), so that threads can share a tensor.
#pragma once
#include <cstdint>

namespace bitdial {

// t = acc * multiplier[c] + bias[c], + residual * factor if there is one; out = rne(clamp(t, lo, hi)), inside = lo < t < hi.
struct RequantizeArgs {
    const void* acc;
    const float* multiplier;
    const float* bias;
    const void* residual;  // null, or of the type of `out`
    float factor, lo, hi;
    void* out;
    uint8_t* inside;
    int64_t channels;
};

// g = inside ? grad : 0; grad_acc = g * multiplier[c]; grad_residual = g * factor; grad_bias[c] += g over these rows.
struct RequantizeGradArgs {
    const void* grad;  // of the type of `out`, as grad_residual
    const uint8_t* inside;
    const float* multiplier;
    float factor;
    void* grad_acc;       // of the type of `acc`
    void* grad_residual;  // null if not wanted
    float* grad_bias;     // null if not wanted; the caller's own sums of these rows
    int64_t channels;
};

// t = rne(x * inverse[c]); y = clamp(t, lo[c], hi[c]); out = y * power[c]; inside = t == y. |x * inverse| is at most 255.
struct ExtractFloatsArgs {
    const void* x;
    const float *inverse, *power, *lo, *hi;
    void* out;
    uint8_t* inside;
    int64_t channels;
};

// at = (byte) x, an integer from -128 to 255; out = values[at], slope = slopes[at]: any function of an 8-bit value.
struct LookUpArgs {
    const void* x;
    const float *values, *slopes;  // 256 each; values exact in the type of `out`
    void* out;
    void* slope;
    int64_t channels;
};

// out = inside ? grad : 0.
struct PassArgs {
    const void* grad;
    const uint8_t* inside;
    void* out;
    int64_t channels;
};

// One type for all, or acc float32 and out bfloat16 (the border where a float value is quantized).
enum class Types { f32, bf16, f32_bf16 };

}  // namespace bitdial
