// From accumulators to stored outputs, bit for bit as the reference engine does it.
#pragma once
#include "../simd/simd.h"
#include "conv_args.h"

namespace bitdial {
namespace BITDIAL_ISA {

// Where one pixel's outputs and residual lie (channel 0 of the convolution group).
struct Pixel {
    uint8_t* out;
    const uint8_t* residual;
};

// n <= LANES outputs from channel k on. BIASED: acc has its bias.
template <bool BIASED>
BITDIAL_INLINE void finish(const Epilogue& e, vi acc, int32_t k, int n, const Pixel& p) {
    if (!BIASED) acc = add(acc, load(e.bias + k));
    if (__builtin_expect(e.kind == OUT_ACCUMULATORS, 0)) {
        store(reinterpret_cast<int32_t*>(p.out) + k, acc, first(n));
        return;
    }
    vf t = mul(to_float(acc), load(e.multiplier + k));
    if (e.residual_kind == RESIDUAL_BYTES) {
        const vi r = sub(load_bytes_wide(p.residual + k, n), set(e.zero_residual));
        t = add(t, mul(to_float(r), set(e.residual_factor)));
    } else if (__builtin_expect(e.residual_kind == RESIDUAL_FLOAT, 0)) {
        const float* r = reinterpret_cast<const float*>(p.residual) + k * e.residual_stride_c;
        alignas(64) float own[LANES] = {0};
        for (int i = 0; i < n; i++) own[i] = r[i * e.residual_stride_c];
        t = add(t, load(own));
    }
    t = clamp(t, set(e.lo), set(e.hi));
    if (__builtin_expect(e.kind == OUT_FLOAT, 0)) {
        float* o = reinterpret_cast<float*>(p.out) + k * e.out_stride_c;
        if (e.out_stride_c == 1) {
            store(o, t, first(n));
        } else {
            alignas(64) float own[LANES];
            store(own, t);
            for (int i = 0; i < n; i++) o[i * e.out_stride_c] = own[i];
        }
        return;
    }
    store_bytes(p.out + k, add(round_even(t), set(e.zero_out)), n);
}

// N adjacent vectors of outputs of one pixel; left: outputs from k to the end of the layer. BIASED: the sums have their bias.
template <int N, EpilogueMode MODE, bool BIASED>
BITDIAL_INLINE void finish_row(const Epilogue& e, const vi (&a)[N], int32_t k, int32_t left,
                                                             const Pixel& p) {
    if (MODE == EPILOGUE_ANY) {
        _Pragma("GCC unroll 8") for (int j = 0; j < N; j++) {
            const int32_t n = left - j * LANES < LANES ? left - j * LANES : LANES;
            if (n > 0) finish<BIASED>(e, a[j], k + j * LANES, n, p);
        }
        return;
    }
    const vf lo = set(e.lo), hi = set(e.hi), factor = set(e.residual_factor);
    const vi zero_r = set(e.zero_residual), zero_o = set(e.zero_out);
    vi q[N];
    _Pragma("GCC unroll 8") for (int j = 0; j < N; j++) {
        const int32_t o = k + j * LANES;
        vf t = mul(to_float(BIASED ? a[j] : add(a[j], load(e.bias + o))), load(e.multiplier + o));
        if (MODE == EPILOGUE_RESIDUAL) {
            const int32_t n = left - j * LANES < LANES ? left - j * LANES : LANES;
            t = add(t, mul(to_float(sub(load_bytes_wide(p.residual + o, n), zero_r)), factor));
        }
        if (MODE == EPILOGUE_SATURATED || MODE == EPILOGUE_SIGNED)
            q[j] = round_even(t);
        else
            q[j] = add(round_even(clamp(t, lo, hi)), zero_o);
    }
    store_packed<N, MODE == EPILOGUE_SIGNED>(p.out + k, q, left);
}

// R pixels.
template <bool BIASED, int R, int N>
BITDIAL_INLINE void finish_rows(const Epilogue& e, const vi (&a)[R][N], int32_t k, int32_t left,
                                                              const Pixel* pixels) {
    switch (e.mode) {
#define BITDIAL_MODE(MODE) \
    case MODE:                                                                                                             \
        if constexpr (SATURATES || MODE < EPILOGUE_SATURATED) {                                                            \
            _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) finish_row<N, MODE, BIASED>(e, a[i], k, left, pixels[i]); \
        }                                                                                                                  \
        break;
        BITDIAL_MODE(EPILOGUE_SATURATED)
        BITDIAL_MODE(EPILOGUE_SIGNED)
        BITDIAL_MODE(EPILOGUE_LIMITED)
        BITDIAL_MODE(EPILOGUE_RESIDUAL)
        default:
            BITDIAL_MODE(EPILOGUE_ANY)
#undef BITDIAL_MODE
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
