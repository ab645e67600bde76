// The vectors of lanes.h in plain C++, 16 elements at once, with the vector types that GCC and Clang offer on every target.
// Conversions between bytes and floats, which compilers do badly from plain code, have a form for x86's base instructions.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>

#include "always_inline.h"

namespace bitdial {
namespace BITDIAL_ISA {

static constexpr int32_t kBlock = 16;

typedef uint8_t ByteVector __attribute__((vector_size(16)));
typedef uint16_t WordVector __attribute__((vector_size(16)));
typedef uint32_t BitVector __attribute__((vector_size(16)));
typedef int32_t IntVector __attribute__((vector_size(16)));
typedef float FloatVector __attribute__((vector_size(16)));

struct Bytes {
    ByteVector v;
};
struct Floats {
    FloatVector v[4];
};
struct Ints {
    IntVector v[4];
};

// The first `count` elements, the rest zero.
template <typename Block, typename T>
static inline BITDIAL_ALWAYS_INLINE Block load_part(const T* from, int32_t count) {
    T part[16] = {};
    for (int32_t i = 0; i < count; ++i) part[i] = from[i];
    Block r;
    __builtin_memcpy(&r, part, sizeof r);
    return r;
}
template <typename Block, typename T>
static inline BITDIAL_ALWAYS_INLINE void store_part(T* to, const Block& block, int32_t count) {
    T part[16];
    __builtin_memcpy(part, &block, sizeof part);
    for (int32_t i = 0; i < count; ++i) to[i] = part[i];
}
template <typename Block>
static inline BITDIAL_ALWAYS_INLINE Block load_whole(const void* from) {
    Block r;
    __builtin_memcpy(&r, from, sizeof r);
    return r;
}

static inline BITDIAL_ALWAYS_INLINE Bytes load(const uint8_t* from) { return load_whole<Bytes>(from); }
static inline BITDIAL_ALWAYS_INLINE Bytes load(const uint8_t* from, int32_t count) { return load_part<Bytes>(from, count); }
static inline BITDIAL_ALWAYS_INLINE void store(uint8_t* to, const Bytes& bytes) { __builtin_memcpy(to, &bytes, sizeof bytes); }
static inline BITDIAL_ALWAYS_INLINE void store(uint8_t* to, const Bytes& bytes, int32_t count) { store_part(to, bytes, count); }
static inline BITDIAL_ALWAYS_INLINE Floats load(const float* from) { return load_whole<Floats>(from); }
static inline BITDIAL_ALWAYS_INLINE Floats load(const float* from, int32_t count) { return load_part<Floats>(from, count); }
static inline BITDIAL_ALWAYS_INLINE void store(float* to, const Floats& x) { __builtin_memcpy(to, &x, sizeof x); }
static inline BITDIAL_ALWAYS_INLINE void store(float* to, const Floats& x, int32_t count) { store_part(to, x, count); }
static inline BITDIAL_ALWAYS_INLINE Ints load(const int32_t* from, int32_t count) { return load_part<Ints>(from, count); }
static inline BITDIAL_ALWAYS_INLINE void store(int32_t* to, const Ints& x, int32_t count) { store_part(to, x, count); }

static inline BITDIAL_ALWAYS_INLINE Bytes fill(uint8_t value) { return {ByteVector{} + value}; }
static inline BITDIAL_ALWAYS_INLINE Bytes maximum(const Bytes& a, const Bytes& b) { return {a.v > b.v ? a.v : b.v}; }
static inline BITDIAL_ALWAYS_INLINE Bytes minimum(const Bytes& a, const Bytes& b) { return {a.v < b.v ? a.v : b.v}; }
static inline BITDIAL_ALWAYS_INLINE Bytes add_wrapping(const Bytes& a, const Bytes& b) { return {a.v + b.v}; }

static inline BITDIAL_ALWAYS_INLINE Floats fill(float value) {
    const FloatVector v = {value, value, value, value};  // 0 + value would lose the sign of -0
    return {{v, v, v, v}};
}
static inline BITDIAL_ALWAYS_INLINE Floats multiply(const Floats& a, const Floats& b) {
    return {{a.v[0] * b.v[0], a.v[1] * b.v[1], a.v[2] * b.v[2], a.v[3] * b.v[3]}};
}
static inline BITDIAL_ALWAYS_INLINE Floats add(const Floats& a, const Floats& b) {
    return {{a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]}};
}
static inline BITDIAL_ALWAYS_INLINE Floats clamp(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) {
        const FloatVector raised = t.v[k] > lo.v[k] ? t.v[k] : lo.v[k];
        r.v[k] = raised < hi.v[k] ? raised : hi.v[k];
    }
    return r;
}

static inline BITDIAL_ALWAYS_INLINE Floats subtract(const Floats& a, const Floats& b) {
    return {{a.v[0] - b.v[0], a.v[1] - b.v[1], a.v[2] - b.v[2], a.v[3] - b.v[3]}};
}
static inline BITDIAL_ALWAYS_INLINE Floats divide(const Floats& a, const Floats& b) {
    return {{a.v[0] / b.v[0], a.v[1] / b.v[1], a.v[2] / b.v[2], a.v[3] / b.v[3]}};
}
static inline BITDIAL_ALWAYS_INLINE Floats bound(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) {
        const FloatVector raised = t.v[k] < lo.v[k] ? lo.v[k] : t.v[k];
        r.v[k] = raised > hi.v[k] ? hi.v[k] : raised;
    }
    return r;
}

typedef Floats Sixteen;  // kBlock is 16
static inline BITDIAL_ALWAYS_INLINE Sixteen load16(const float* from) { return load(from); }
static inline BITDIAL_ALWAYS_INLINE Sixteen load16(const float* from, int32_t count) { return load(from, count); }
static inline BITDIAL_ALWAYS_INLINE Sixteen fill16(float value) { return fill(value); }
static inline BITDIAL_ALWAYS_INLINE Sixteen first16(const Sixteen& x, int32_t count) {
    float part[16];
    __builtin_memcpy(part, &x, sizeof part);
    return load_part<Sixteen>(part, count);
}
static inline BITDIAL_ALWAYS_INLINE float total(const Sixteen& x) {
    const FloatVector four = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

#if defined(__SSE2__)
// Unpacking with zeros widens; packing with saturation narrows (values lie in -127..255, bytes after masking).
static inline BITDIAL_ALWAYS_INLINE Floats values(const Bytes& bytes, int32_t zero) {
    const __m128i none = _mm_setzero_si128(), offset = _mm_set1_epi32(zero), b = reinterpret_cast<__m128i>(bytes.v);
    const __m128i words[2] = {_mm_unpacklo_epi8(b, none), _mm_unpackhi_epi8(b, none)};
    Floats r;
    for (int32_t k = 0; k < 4; ++k) {
        const __m128i w = words[k / 2], wide = k % 2 == 0 ? _mm_unpacklo_epi16(w, none) : _mm_unpackhi_epi16(w, none);
        r.v[k] = _mm_cvtepi32_ps(_mm_sub_epi32(wide, offset));
    }
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Bytes narrow(const Floats& t, const Bytes& zero) {
    const __m128i byte = _mm_set1_epi16(0xff);
    const __m128i low = _mm_packs_epi32(_mm_cvtps_epi32(t.v[0]), _mm_cvtps_epi32(t.v[1]));
    const __m128i high = _mm_packs_epi32(_mm_cvtps_epi32(t.v[2]), _mm_cvtps_epi32(t.v[3]));
    const __m128i values = _mm_packus_epi16(_mm_and_si128(low, byte), _mm_and_si128(high, byte));
    return {reinterpret_cast<ByteVector>(values) + zero.v};
}
#else
static inline BITDIAL_ALWAYS_INLINE Floats values(const Bytes& bytes, int32_t zero) {
    uint8_t stored[16];
    __builtin_memcpy(stored, &bytes, 16);
    float value[16];
    for (int32_t i = 0; i < 16; ++i) value[i] = static_cast<float>(static_cast<int32_t>(stored[i]) - zero);
    return load_whole<Floats>(value);
}

// Adding 1.5 * 2^23 rounds to an integer (floats are computed as floats; no wider arithmetic is in use) whose low byte is
// that of the float's bits.
static inline BITDIAL_ALWAYS_INLINE Bytes narrow(const Floats& t, const Bytes& zero) {
    uint32_t bits[16];
    for (int32_t k = 0; k < 4; ++k) {
        const FloatVector shifted = t.v[k] + 12582912.0f;
        __builtin_memcpy(bits + 4 * k, &shifted, 16);
    }
    uint8_t low[16];
    for (int32_t i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>(bits[i]);
    return {load_whole<Bytes>(low).v + zero.v};
}
#endif

static inline BITDIAL_ALWAYS_INLINE Floats to_floats(const Ints& x) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = __builtin_convertvector(x.v[k], FloatVector);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Ints fill(int32_t value) {
    const IntVector v = IntVector{} + value;
    return {{v, v, v, v}};
}
static inline BITDIAL_ALWAYS_INLINE Ints add(const Ints& a, const Ints& b) {  // wraps
    Ints r;
    for (int32_t k = 0; k < 4; ++k) {
        r.v[k] = reinterpret_cast<IntVector>(reinterpret_cast<BitVector>(a.v[k]) + reinterpret_cast<BitVector>(b.v[k]));
    }
    return r;
}

struct Watch {
    IntVector largest;
};
static inline BITDIAL_ALWAYS_INLINE Watch start_watch() { return {IntVector{}}; }
static inline BITDIAL_ALWAYS_INLINE void watch(Watch& state, const Floats& x) {
    for (int32_t k = 0; k < 4; ++k) {
        const IntVector magnitude = reinterpret_cast<IntVector>(x.v[k]) & 0x7fffffff;
        state.largest = magnitude > state.largest ? magnitude : state.largest;
    }
}
static inline BITDIAL_ALWAYS_INLINE bool any_nonfinite(const Watch& state) {
    bool found = false;
    for (int32_t i = 0; i < 4; ++i) found = found || state.largest[i] >= 0x7f800000;
    return found;
}

// Bytes of even and odd address are summed apart.
struct Words {
    WordVector even, odd;
};
static inline BITDIAL_ALWAYS_INLINE Words zero_words() { return {WordVector{}, WordVector{}}; }
static inline BITDIAL_ALWAYS_INLINE void accumulate(Words& words, const Bytes& bytes) {
    const WordVector pairs = reinterpret_cast<WordVector>(bytes.v);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    words.even += pairs & 0xff;
    words.odd += pairs >> 8;
#else
    words.even += pairs >> 8;
    words.odd += pairs & 0xff;
#endif
}
static inline BITDIAL_ALWAYS_INLINE void gather_words(Ints& sums, const Words& words) {
    for (int32_t i = 0; i < 8; ++i) {
        sums.v[i / 2][2 * (i % 2)] += words.even[i];
        sums.v[i / 2][2 * (i % 2) + 1] += words.odd[i];
    }
}

// A byte times an int8 weight fits 16 bits: 255 * 128 < 2^15.
static constexpr int32_t kTapGroup = 1;
struct Taps {
    int16_t v[16];
};
static inline BITDIAL_ALWAYS_INLINE Taps pack_weights(const Bytes tap[1]) {
    Taps r;
    for (int32_t i = 0; i < 16; ++i) r.v[i] = static_cast<int8_t>(tap[0].v[i]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE void multiply_taps(Ints& sums, const Bytes tap[1], const Taps& weights) {
    uint8_t stored[16];
    __builtin_memcpy(stored, tap, 16);
    int16_t words[16];
    for (int32_t i = 0; i < 16; ++i) words[i] = static_cast<int16_t>(stored[i] * weights.v[i]);
    int32_t product[16];
    for (int32_t i = 0; i < 16; ++i) product[i] = words[i];
    sums = add(sums, load_whole<Ints>(product));
}
static inline BITDIAL_ALWAYS_INLINE Ints in_order(const Ints& x) { return x; }

struct Table {
    const uint8_t* entries;
};
static inline BITDIAL_ALWAYS_INLINE Table load_table(const uint8_t* table) { return {table}; }
static inline BITDIAL_ALWAYS_INLINE Bytes look_up(const Table& table, const Bytes& index) {
    uint8_t place[16], found[16];
    __builtin_memcpy(place, &index, 16);
    for (int32_t i = 0; i < 16; ++i) found[i] = table.entries[place[i]];
    return load_whole<Bytes>(found);
}

// Writes r0 g0 b0 r1 g1 b1 ... (3 * kBlock bytes).
static inline BITDIAL_ALWAYS_INLINE void store_interleaved3(uint8_t* to, const Bytes& r, const Bytes& g, const Bytes& b) {
    uint8_t plane[3][16];
    __builtin_memcpy(plane[0], &r, 16);
    __builtin_memcpy(plane[1], &g, 16);
    __builtin_memcpy(plane[2], &b, 16);
    for (int32_t i = 0; i < 16; ++i) {
        for (int32_t c = 0; c < 3; ++c) to[3 * i + c] = plane[c][i];
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
