// Several registers as one value, the same for every instruction set.
#pragma once

namespace bitdial {
namespace BITDIAL_ISA {

template <int COUNT>
struct FloatsOf {
    enum { N = COUNT };
    vf v[N];
};
typedef FloatsOf<4> Floats;
typedef FloatsOf<16 / LANES> Sixteen;
struct Ints {
    enum { N = 4 };
    vi v[N];
};

template <typename Block, typename T>
BITDIAL_INLINE Block load_block(const T* from) {
    Block r;
    for (int k = 0; k < Block::N; ++k) r.v[k] = load(from + LANES * k);
    return r;
}
template <typename Block, typename T>
BITDIAL_INLINE Block load_block(const T* from, int32_t count) {
    Block r;
    for (int k = 0; k < Block::N; ++k) r.v[k] = load(from + LANES * k, part(count, k));
    return r;
}
BITDIAL_INLINE void store(float* to, const Floats& x) {
    for (int k = 0; k < 4; ++k) store(to + LANES * k, x.v[k]);
}
BITDIAL_INLINE void store(float* to, const Floats& x, int32_t count) {
    for (int k = 0; k < 4; ++k) store(to + LANES * k, x.v[k], part(count, k));
}
BITDIAL_INLINE void store(int32_t* to, const Ints& x, int32_t count) {
    for (int k = 0; k < 4; ++k) store(to + LANES * k, x.v[k], part(count, k));
}
template <typename Block = Floats>
BITDIAL_INLINE Block fill(float value) {
    Block r;
    for (int k = 0; k < Block::N; ++k) r.v[k] = set(value);
    return r;
}
BITDIAL_INLINE Ints fill(int32_t value) {
    const vi v = set(value);
    return {{v, v, v, v}};
}

#define BITDIAL_PAIRWISE(operation)                                                          \
    template <int N>                                                                         \
    BITDIAL_INLINE FloatsOf<N> operation(const FloatsOf<N>& a, const FloatsOf<N>& b) {       \
        FloatsOf<N> r;                                                                       \
        for (int k = 0; k < N; ++k) r.v[k] = operation(a.v[k], b.v[k]);                      \
        return r;                                                                            \
    }
BITDIAL_PAIRWISE(add)
BITDIAL_PAIRWISE(sub)
BITDIAL_PAIRWISE(mul)
BITDIAL_PAIRWISE(div)
#undef BITDIAL_PAIRWISE
BITDIAL_INLINE Floats clamp(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int k = 0; k < 4; ++k) r.v[k] = clamp(t.v[k], lo.v[k], hi.v[k]);
    return r;
}
BITDIAL_INLINE Floats bound(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int k = 0; k < 4; ++k) r.v[k] = bound(t.v[k], lo.v[k], hi.v[k]);
    return r;
}
BITDIAL_INLINE Floats to_float(const Ints& x) {
    Floats r;
    for (int k = 0; k < 4; ++k) r.v[k] = to_float(x.v[k]);
    return r;
}
BITDIAL_INLINE Ints add(const Ints& a, const Ints& b) {  // wraps
    Ints r;
    for (int k = 0; k < 4; ++k) r.v[k] = add(a.v[k], b.v[k]);
    return r;
}
BITDIAL_INLINE Sixteen first_of(const Sixteen& x, int32_t count) {
    Sixteen r;
    for (int k = 0; k < Sixteen::N; ++k) r.v[k] = first_or(x.v[k], part(count, k), set(0.0f));
    return r;
}

BITDIAL_INLINE float total(const Sixteen& x) { return total(x.v); }

// Whether NaN or infinite values were seen, by their magnitudes' bits.
struct Watch {
    vi largest;
};
BITDIAL_INLINE Watch start_watch() { return {zero()}; }
BITDIAL_INLINE void watch(Watch& state, const Floats& x) {
    for (int k = 0; k < 4; ++k) state.largest = larger(state.largest, both(bits_of(x.v[k]), set(0x7fffffff)));
}
BITDIAL_INLINE bool any_nonfinite(const Watch& state) {
    int32_t lane[LANES];
    store(lane, state.largest);
    bool found = false;
    for (int i = 0; i < LANES; ++i) found = found || lane[i] >= 0x7f800000;
    return found;
}

template <bool Whole>
BITDIAL_INLINE vi load(const uint8_t* from, int32_t count) {
    if (Whole) return load(from);
    return load(from, count);
}
template <bool Whole>
BITDIAL_INLINE Floats load_floats(const float* from, int32_t count) {
    if (Whole) return load_block<Floats>(from);
    return load_block<Floats>(from, count);
}
template <bool Whole, typename T, typename V>
BITDIAL_INLINE void store(T* to, const V& x, int32_t count) {
    if (Whole)
        store(to, x);
    else
        store(to, x, count);
}

#if !BITDIAL_EXTRACT_BYTES
static inline void sum_four(const vi (&v)[4], int32_t* to) {
    for (int s = 0; s < 4; s++) to[s] = sum(v[s]);
}

// clamp(rne(w / 2^s), -limit, limit) of a vector of signed bytes.
static inline vi low_weights(vi w, int s, int limit_) {
    uint8_t in[BYTES], out[BYTES];
    store(in, w);
    const vi shift = set(s + 1), half = set((1 << s) - 1), lo = set(-limit_), hi = set(limit_), middle = set(128);
    for (int b = 0; b < BYTES; b += LANES) {
        for (int i = 0; i < LANES; i++) in[b + i] = static_cast<uint8_t>(in[b + i] ^ 128);
        store_bytes(out + b, extract(sub(load_bytes_wide(in + b, LANES), middle), shift, half, lo, hi), LANES);
    }
    return load(out);
}
#endif

BITDIAL_INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
BITDIAL_INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// body(Count<n>()) for 1 <= n <= MOST: sizes of register tiles are known at compile time.
template <int N>
struct Count {
    enum { value = N };
};
template <int MOST, typename Body>
BITDIAL_INLINE void with_count(int n, const Body& body) {
    static_assert(MOST <= 8, "a case for each");
    switch (n) {
#define BITDIAL_CASE(N) \
    case N: if constexpr (N <= MOST) body(Count<N>()); break;
        BITDIAL_CASE(1) BITDIAL_CASE(2) BITDIAL_CASE(3) BITDIAL_CASE(4)
        BITDIAL_CASE(5) BITDIAL_CASE(6) BITDIAL_CASE(7) BITDIAL_CASE(8)
#undef BITDIAL_CASE
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
