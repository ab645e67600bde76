// The loops of training.h, plain C++ that compilers turn into vector instructions; compiled once per instruction set.
#pragma once
#include <cstring>

#include "training.h"

// The arrays of a loop do not overlap; GCC gives up on more than a few pointers, whatever __restrict says.
#if defined(__clang__)
#define BITDIAL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define BITDIAL_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace bitdial {
namespace BITDIAL_ISA {
namespace {

inline uint32_t bits(float value) {
    uint32_t result;
    std::memcpy(&result, &value, 4);
    return result;
}

inline float from_bits(uint32_t value) {
    float result;
    std::memcpy(&result, &value, 4);
    return result;
}

struct F32 {
    using Element = float;
    static float load(Element value) { return value; }
    static Element store(float value) { return value; }
    static Element store_short(float value) { return value; }
};

struct BF16 {
    using Element = uint16_t;
    static float load(Element value) { return from_bits(static_cast<uint32_t>(value) << 16); }
    // To nearest, ties to even.
    static Element store(float value) {
        const uint32_t raw = bits(value);
        const uint32_t rounded = (raw + 0x7fffu + (raw >> 16 & 1u)) >> 16;
        return static_cast<Element>((raw & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
    // Of what bfloat16 holds exactly, or NaN.
    static Element store_short(float value) { return static_cast<Element>(bits(value) >> 16); }
};

// Of |value| < 2^22: the sum has no bits behind the point. NaN stays.
inline float rne(float value) {
    constexpr float kPoint = 12582912.f;  // 1.5 * 2^23
    return (value + kPoint) - kPoint;
}

// Comparisons with NaN are false, so that it passes.
inline float clamp(float value, float lo, float hi) {
    const float raised = value < lo ? lo : value;
    return raised > hi ? hi : raised;
}

template <class In, class Out, bool kResidual>
void requantize_rows(const RequantizeArgs& a, int64_t row0, int64_t row1) {
    using From = typename In::Element;
    using To = typename Out::Element;
    const int64_t channels = a.channels;
    const float factor = a.factor, lo = a.lo, hi = a.hi;
    const float* __restrict multiplier = a.multiplier;
    const float* __restrict bias = a.bias;
    for (int64_t row = row0; row < row1; ++row) {
        const From* __restrict acc = static_cast<const From*>(a.acc) + row * channels;
        const To* __restrict residual = kResidual ? static_cast<const To*>(a.residual) + row * channels : nullptr;
        To* __restrict out = static_cast<To*>(a.out) + row * channels;
        uint8_t* __restrict inside = a.inside + row * channels;
        BITDIAL_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
            float t = In::load(acc[c]) * multiplier[c] + bias[c];
            if (kResidual) t = t + Out::load(residual[c]) * factor;
            inside[c] = static_cast<uint8_t>((t > lo) & (t < hi));
            out[c] = Out::store_short(rne(clamp(t, lo, hi)));
        }
    }
}

template <class In, class Out, bool kResidual, bool kBias>
void requantize_grad_rows(const RequantizeGradArgs& a, int64_t row0, int64_t row1) {
    using From = typename In::Element;
    using To = typename Out::Element;
    const int64_t channels = a.channels;
    const float factor = a.factor;
    const float* __restrict multiplier = a.multiplier;
    float* __restrict sums = a.grad_bias;
    for (int64_t row = row0; row < row1; ++row) {
        const To* __restrict grad = static_cast<const To*>(a.grad) + row * channels;
        const uint8_t* __restrict inside = a.inside + row * channels;
        From* __restrict grad_acc = static_cast<From*>(a.grad_acc) + row * channels;
        To* __restrict grad_residual = kResidual ? static_cast<To*>(a.grad_residual) + row * channels : nullptr;
        BITDIAL_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
            const float whole = Out::load(grad[c]);
            const float g = inside[c] ? whole : 0.f;
            grad_acc[c] = In::store(g * multiplier[c]);
            if (kResidual) grad_residual[c] = Out::store(g * factor);
            if (kBias) sums[c] += g;
        }
    }
}

template <class T>
void extract_rows(const ExtractFloatsArgs& a, int64_t row0, int64_t row1) {
    using Element = typename T::Element;
    const int64_t channels = a.channels;
    const float* __restrict inverse = a.inverse;
    const float* __restrict power = a.power;
    const float* __restrict lo = a.lo;
    const float* __restrict hi = a.hi;
    for (int64_t row = row0; row < row1; ++row) {
        const Element* __restrict x = static_cast<const Element*>(a.x) + row * channels;
        Element* __restrict out = static_cast<Element*>(a.out) + row * channels;
        uint8_t* __restrict inside = a.inside + row * channels;
        BITDIAL_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
            const float t = rne(T::load(x[c]) * inverse[c]);
            const float y = clamp(t, lo[c], hi[c]);
            inside[c] = static_cast<uint8_t>(t == y);
            out[c] = T::store_short(y * power[c]);
        }
    }
}

template <class T>
void look_up_rows(const LookUpArgs& a, int64_t row0, int64_t row1) {
    using Element = typename T::Element;
    const int64_t begin = row0 * a.channels, end = row1 * a.channels;
    const Element* __restrict x = static_cast<const Element*>(a.x);
    const float* __restrict values = a.values;
    const float* __restrict slopes = a.slopes;
    Element* __restrict out = static_cast<Element*>(a.out);
    Element* __restrict slope = static_cast<Element*>(a.slope);
    BITDIAL_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) {
        // Adding 1.5 * 2^23 leaves an integer in the lowest bits; conversion of NaN would be undefined.
        const uint32_t at = bits(T::load(x[i]) + 12582912.f) & 255u;
        out[i] = T::store_short(values[at]);
        slope[i] = T::store(slopes[at]);
    }
}

template <class T>
void pass_rows(const PassArgs& a, int64_t row0, int64_t row1) {
    using Element = typename T::Element;
    const int64_t begin = row0 * a.channels, end = row1 * a.channels;
    const Element* __restrict grad = static_cast<const Element*>(a.grad);
    const uint8_t* __restrict inside = a.inside;
    Element* __restrict out = static_cast<Element*>(a.out);
    BITDIAL_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) {
        const Element whole = grad[i];
        out[i] = inside[i] ? whole : Element(0);
    }
}

template <class In, class Out>
void requantize_typed(const RequantizeArgs& a, int64_t row0, int64_t row1) {
    if (a.residual) return requantize_rows<In, Out, true>(a, row0, row1);
    requantize_rows<In, Out, false>(a, row0, row1);
}

template <class In, class Out>
void requantize_grad_typed(const RequantizeGradArgs& a, int64_t row0, int64_t row1) {
    if (a.grad_residual && a.grad_bias) return requantize_grad_rows<In, Out, true, true>(a, row0, row1);
    if (a.grad_residual) return requantize_grad_rows<In, Out, true, false>(a, row0, row1);
    if (a.grad_bias) return requantize_grad_rows<In, Out, false, true>(a, row0, row1);
    requantize_grad_rows<In, Out, false, false>(a, row0, row1);
}

}  // namespace

void requantize(const RequantizeArgs& a, Types types, int64_t row0, int64_t row1) {
    if (types == Types::bf16) return requantize_typed<BF16, BF16>(a, row0, row1);
    if (types == Types::f32_bf16) return requantize_typed<F32, BF16>(a, row0, row1);
    requantize_typed<F32, F32>(a, row0, row1);
}

void requantize_grad(const RequantizeGradArgs& a, Types types, int64_t row0, int64_t row1) {
    if (types == Types::bf16) return requantize_grad_typed<BF16, BF16>(a, row0, row1);
    if (types == Types::f32_bf16) return requantize_grad_typed<F32, BF16>(a, row0, row1);
    requantize_grad_typed<F32, F32>(a, row0, row1);
}

void extract_floats(const ExtractFloatsArgs& a, Types types, int64_t row0, int64_t row1) {
    if (types == Types::bf16) return extract_rows<BF16>(a, row0, row1);
    extract_rows<F32>(a, row0, row1);
}

void look_up(const LookUpArgs& a, Types types, int64_t row0, int64_t row1) {
    if (types == Types::bf16) return look_up_rows<BF16>(a, row0, row1);
    look_up_rows<F32>(a, row0, row1);
}

void pass(const PassArgs& a, Types types, int64_t row0, int64_t row1) {
    if (types == Types::bf16) return pass_rows<BF16>(a, row0, row1);
    pass_rows<F32>(a, row0, row1);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial

#undef BITDIAL_INDEPENDENT
