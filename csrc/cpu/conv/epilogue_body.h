// From accumulators to stored outputs, bit for bit as the reference engine does it. Included inside a namespace of one
// instruction set, after its simd header.

// Where one pixel's outputs and residual lie (channel 0 of the convolution group).
struct Pixel {
    uint8_t* out;
    const uint8_t* residual;
};

// n <= LANES outputs from channel k on.
static inline __attribute__((always_inline)) void finish(const Epilogue& e, vi acc, int32_t k, int n, const Pixel& p) {
    acc = add(acc, load(e.bias + k));
    if (__builtin_expect(e.kind == OUT_ACCUMULATORS, 0)) {
        store_some(reinterpret_cast<int32_t*>(p.out) + k, acc, n);
        return;
    }
    vf t = mul(to_float(acc), load_float(e.multiplier + k));
    if (e.residual_kind == RESIDUAL_BYTES) {
        const vi r = sub(load_bytes_wide(p.residual + k, n), set(e.zero_residual));
        t = add_float(t, mul(to_float(r), set_float(e.residual_factor)));
    } else if (__builtin_expect(e.residual_kind == RESIDUAL_FLOAT, 0)) {
        const float* r = reinterpret_cast<const float*>(p.residual) + k * e.residual_stride_c;
        alignas(64) float own[LANES] = {0};
        for (int i = 0; i < n; i++) own[i] = r[i * e.residual_stride_c];
        t = add_float(t, load_float(own));
    }
    t = limit(t, set_float(e.lo), set_float(e.hi));
    if (__builtin_expect(e.kind == OUT_FLOAT, 0)) {
        float* o = reinterpret_cast<float*>(p.out) + k * e.out_stride_c;
        if (e.out_stride_c == 1) {
            store_some_float(o, t, n);
        } else {
            alignas(64) float own[LANES];
            store_some_float(own, t, LANES);
            for (int i = 0; i < n; i++) o[i * e.out_stride_c] = own[i];
        }
        return;
    }
    store_bytes(p.out + k, add(round_even(t), set(e.zero_out)), n);
}

// N adjacent vectors of outputs of one pixel; left: outputs from k to the end of the layer. Whole blocks of bytes, the usual
// case, are packed and stored at once.
template <int N, EpilogueMode MODE>
static inline __attribute__((always_inline)) void finish_row(const Epilogue& e, const vi (&a)[N], int32_t k, int32_t left,
                                                             const Pixel& p) {
    if (MODE != EPILOGUE_ANY && __builtin_expect(left >= N * LANES, 1)) {
        const vf lo = set_float(e.lo), hi = set_float(e.hi);
        vi q[N];
        if (MODE == EPILOGUE_RESIDUAL) {
            const vi zero_r = set(e.zero_residual), zero_o = set(e.zero_out);
            const vf factor = set_float(e.residual_factor);
            _Pragma("GCC unroll 8") for (int j = 0; j < N; j++) {
                const int32_t o = k + j * LANES;
                const vf t = mul(to_float(add(a[j], load(e.bias + o))), load_float(e.multiplier + o));
                const vf r = mul(to_float(sub(load_bytes_wide(p.residual + o, LANES), zero_r)), factor);
                q[j] = add(round_even(limit(add_float(t, r), lo, hi)), zero_o);
            }
        } else {
            _Pragma("GCC unroll 8") for (int j = 0; j < N; j++) {
                const int32_t o = k + j * LANES;
                q[j] = round_even(limit(mul(to_float(add(a[j], load(e.bias + o))), load_float(e.multiplier + o)), lo, hi));
            }
        }
        store_packed<N>(p.out + k, q);
        return;
    }
    _Pragma("GCC unroll 8") for (int j = 0; j < N; j++) {
        const int32_t n = left - j * LANES < LANES ? left - j * LANES : LANES;
        if (n > 0) finish(e, a[j], k + j * LANES, n, p);
    }
}

// R pixels.
template <int R, int N>
static inline __attribute__((always_inline)) void finish_rows(const Epilogue& e, const vi (&a)[R][N], int32_t k, int32_t left,
                                                              const Pixel* pixels) {
    if (e.mode == EPILOGUE_BYTES) {
        _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) finish_row<N, EPILOGUE_BYTES>(e, a[i], k, left, pixels[i]);
    } else if (e.mode == EPILOGUE_RESIDUAL) {
        _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) finish_row<N, EPILOGUE_RESIDUAL>(e, a[i], k, left, pixels[i]);
    } else {
        _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) finish_row<N, EPILOGUE_ANY>(e, a[i], k, left, pixels[i]);
    }
}
