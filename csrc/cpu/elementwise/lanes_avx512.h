// The vectors of lanes.h with AVX512 (F, BW, DQ, VL, VBMI, VNNI): 64 bytes at once, tails by masks.
#pragma once
#include <cstdint>

#include "always_inline.h"
#include "intrinsics.h"

namespace bitdial {
namespace BITDIAL_ISA {

static constexpr int32_t kBlock = 64;

struct Bytes {
    __m512i v;
};
struct Floats {
    __m512 v[4];
};
struct Ints {
    __m512i v[4];
};

static inline BITDIAL_ALWAYS_INLINE __mmask64 byte_mask(int32_t count) {
    return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Mask of the 32-bit elements of part k (16 elements each) when the block holds `count`.
static inline BITDIAL_ALWAYS_INLINE __mmask16 part_mask(int32_t count, int32_t k) {
    return static_cast<__mmask16>((byte_mask(count) >> (16 * k)) & 0xffff);
}

static inline BITDIAL_ALWAYS_INLINE Bytes load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
static inline BITDIAL_ALWAYS_INLINE Bytes load(const uint8_t* from, int32_t count) {
    return {_mm512_maskz_loadu_epi8(byte_mask(count), from)};
}
static inline BITDIAL_ALWAYS_INLINE void store(uint8_t* to, const Bytes& bytes) { _mm512_storeu_si512(to, bytes.v); }
static inline BITDIAL_ALWAYS_INLINE void store(uint8_t* to, const Bytes& bytes, int32_t count) {
    _mm512_mask_storeu_epi8(to, byte_mask(count), bytes.v);
}
static inline BITDIAL_ALWAYS_INLINE Bytes fill(uint8_t value) { return {_mm512_set1_epi8(static_cast<char>(value))}; }
static inline BITDIAL_ALWAYS_INLINE Bytes maximum(const Bytes& a, const Bytes& b) { return {_mm512_max_epu8(a.v, b.v)}; }
static inline BITDIAL_ALWAYS_INLINE Bytes minimum(const Bytes& a, const Bytes& b) { return {_mm512_min_epu8(a.v, b.v)}; }
static inline BITDIAL_ALWAYS_INLINE Bytes add_wrapping(const Bytes& a, const Bytes& b) { return {_mm512_add_epi8(a.v, b.v)}; }

static inline BITDIAL_ALWAYS_INLINE Floats load(const float* from) {
    return {{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), _mm512_loadu_ps(from + 32), _mm512_loadu_ps(from + 48)}};
}
static inline BITDIAL_ALWAYS_INLINE Floats load(const float* from, int32_t count) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_maskz_loadu_ps(part_mask(count, k), from + 16 * k);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE void store(float* to, const Floats& x) {
    for (int32_t k = 0; k < 4; ++k) _mm512_storeu_ps(to + 16 * k, x.v[k]);
}
static inline BITDIAL_ALWAYS_INLINE void store(float* to, const Floats& x, int32_t count) {
    for (int32_t k = 0; k < 4; ++k) _mm512_mask_storeu_ps(to + 16 * k, part_mask(count, k), x.v[k]);
}

static inline BITDIAL_ALWAYS_INLINE Ints load(const int32_t* from, int32_t count) {
    Ints r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_maskz_loadu_epi32(part_mask(count, k), from + 16 * k);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE void store(int32_t* to, const Ints& x, int32_t count) {
    for (int32_t k = 0; k < 4; ++k) _mm512_mask_storeu_epi32(to + 16 * k, part_mask(count, k), x.v[k]);
}

static inline BITDIAL_ALWAYS_INLINE Floats fill(float value) {
    const __m512 v = _mm512_set1_ps(value);
    return {{v, v, v, v}};
}
static inline BITDIAL_ALWAYS_INLINE Floats multiply(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_mul_ps(a.v[k], b.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Floats add(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_add_ps(a.v[k], b.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Floats clamp(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_min_ps(_mm512_max_ps(t.v[k], lo.v[k]), hi.v[k]);
    return r;
}

static inline BITDIAL_ALWAYS_INLINE Floats subtract(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_sub_ps(a.v[k], b.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Floats divide(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_div_ps(a.v[k], b.v[k]);
    return r;
}
// The instructions give their second operand where one is NaN and where both are zeros.
static inline BITDIAL_ALWAYS_INLINE Floats bound(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_min_ps(hi.v[k], _mm512_max_ps(lo.v[k], t.v[k]));
    return r;
}

struct Sixteen {
    __m512 v;
};
static inline BITDIAL_ALWAYS_INLINE Sixteen load16(const float* from) { return {_mm512_loadu_ps(from)}; }
static inline BITDIAL_ALWAYS_INLINE Sixteen load16(const float* from, int32_t count) {
    return {_mm512_maskz_loadu_ps(part_mask(count, 0), from)};
}
static inline BITDIAL_ALWAYS_INLINE Sixteen fill16(float value) { return {_mm512_set1_ps(value)}; }
static inline BITDIAL_ALWAYS_INLINE Sixteen add(const Sixteen& a, const Sixteen& b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline BITDIAL_ALWAYS_INLINE Sixteen subtract(const Sixteen& a, const Sixteen& b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline BITDIAL_ALWAYS_INLINE Sixteen multiply(const Sixteen& a, const Sixteen& b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline BITDIAL_ALWAYS_INLINE Sixteen first16(const Sixteen& x, int32_t count) {
    return {_mm512_maskz_mov_ps(part_mask(count, 0), x.v)};
}
static inline BITDIAL_ALWAYS_INLINE float total(const Sixteen& x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// One permutation builds the float 2^23 + stored: the byte in the lowest place, 0x4B000000 around it.
static inline BITDIAL_ALWAYS_INLINE Floats values(const Bytes& bytes, int32_t zero) {
    const __m512i frame = _mm512_set1_epi32(0x4B000000);
    const __m512i index = _mm512_add_epi32(
        _mm512_set1_epi32(0x43404000), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512 offset = _mm512_set1_ps(8388608.0f + static_cast<float>(zero));
    Floats r;
    for (int32_t k = 0; k < 4; ++k) {
        const __m512i place = _mm512_add_epi32(index, _mm512_set1_epi32(16 * k));
        r.v[k] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_permutex2var_epi8(bytes.v, place, frame)), offset);
    }
    return r;
}

// Adding 1.5 * 2^23 rounds to an integer and leaves its low byte in the lowest place.
static inline BITDIAL_ALWAYS_INLINE Bytes narrow(const Floats& t, const Bytes& zero) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    const __m512i index = _mm512_set_epi32(
        0, 0, 0, 0, 0, 0, 0, 0, 0x7c787470, 0x6c686460, 0x5c585450, 0x4c484440, 0x3c383430, 0x2c282420, 0x1c181410,
        0x0c080400);
    __m512i u[4];
    for (int32_t k = 0; k < 4; ++k) u[k] = _mm512_castps_si512(_mm512_add_ps(t.v[k], magic));
    const __m512i low = _mm512_permutex2var_epi8(u[0], index, u[1]);
    const __m512i high = _mm512_permutex2var_epi8(u[2], index, u[3]);
    return {_mm512_add_epi8(_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1), zero.v)};
}

static inline BITDIAL_ALWAYS_INLINE Floats to_floats(const Ints& x) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_cvtepi32_ps(x.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Ints fill(int32_t value) {
    const __m512i v = _mm512_set1_epi32(value);
    return {{v, v, v, v}};
}
static inline BITDIAL_ALWAYS_INLINE Ints add(const Ints& a, const Ints& b) {
    Ints r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm512_add_epi32(a.v[k], b.v[k]);
    return r;
}

struct Watch {
    __m512i largest;
};
static inline BITDIAL_ALWAYS_INLINE Watch start_watch() { return {_mm512_setzero_si512()}; }
static inline BITDIAL_ALWAYS_INLINE void watch(Watch& state, const Floats& x) {
    for (int32_t k = 0; k < 4; ++k) {
        const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x.v[k]), _mm512_set1_epi32(0x7fffffff));
        state.largest = _mm512_max_epi32(state.largest, bits);
    }
}
static inline BITDIAL_ALWAYS_INLINE bool any_nonfinite(const Watch& state) {
    return _mm512_cmpge_epi32_mask(state.largest, _mm512_set1_epi32(0x7f800000)) != 0;
}

// Even and odd bytes are summed apart, without any shuffle.
struct Words {
    __m512i even, odd;
};
static inline BITDIAL_ALWAYS_INLINE Words zero_words() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
static inline BITDIAL_ALWAYS_INLINE void accumulate(Words& words, const Bytes& bytes) {
    words.even = _mm512_add_epi16(words.even, _mm512_and_si512(bytes.v, _mm512_set1_epi16(0xff)));
    words.odd = _mm512_add_epi16(words.odd, _mm512_srli_epi16(bytes.v, 8));
}
static inline BITDIAL_ALWAYS_INLINE void gather_words(Ints& sums, const Words& words) {
    const __m512i a = _mm512_unpacklo_epi16(words.even, words.odd);  // elements 16 l + 0..7 of 128-bit lane l
    const __m512i b = _mm512_unpackhi_epi16(words.even, words.odd);  // 16 l + 8..15
    const __m512i front = _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), b);
    const __m512i back = _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), b);
    const __m256i part[4] = {_mm512_castsi512_si256(front), _mm512_extracti64x4_epi64(front, 1),
                             _mm512_castsi512_si256(back), _mm512_extracti64x4_epi64(back, 1)};
    for (int32_t k = 0; k < 4; ++k) sums.v[k] = _mm512_add_epi32(sums.v[k], _mm512_cvtepu16_epi32(part[k]));
}

// Four taps per VNNI dot product. Interleaving leaves the elements of 128-bit lane l of part k at 16 l + 4 k + 0..3;
// `in_order` turns sums back.
static constexpr int32_t kTapGroup = 4;
struct Taps {
    __m512i v[4];
};
static inline BITDIAL_ALWAYS_INLINE Taps interleave_taps(const Bytes tap[4]) {
    const __m512i low01 = _mm512_unpacklo_epi8(tap[0].v, tap[1].v), high01 = _mm512_unpackhi_epi8(tap[0].v, tap[1].v);
    const __m512i low23 = _mm512_unpacklo_epi8(tap[2].v, tap[3].v), high23 = _mm512_unpackhi_epi8(tap[2].v, tap[3].v);
    return {{_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
             _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)}};
}
static inline BITDIAL_ALWAYS_INLINE Taps pack_weights(const Bytes tap[4]) { return interleave_taps(tap); }
static inline BITDIAL_ALWAYS_INLINE void dot_taps(Ints& sums, const Taps& bytes, const Taps& weights) {
    for (int32_t k = 0; k < 4; ++k) sums.v[k] = _mm512_dpbusd_epi32(sums.v[k], bytes.v[k], weights.v[k]);
}
static inline BITDIAL_ALWAYS_INLINE void multiply_taps(Ints& sums, const Bytes tap[4], const Taps& weights) {
    dot_taps(sums, interleave_taps(tap), weights);
}
static inline BITDIAL_ALWAYS_INLINE Ints in_order(const Ints& x) {
    const __m512i a = _mm512_shuffle_i32x4(x.v[0], x.v[1], 0x44), b = _mm512_shuffle_i32x4(x.v[2], x.v[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(x.v[0], x.v[1], 0xee), d = _mm512_shuffle_i32x4(x.v[2], x.v[3], 0xee);
    return {{_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0x88),
             _mm512_shuffle_i32x4(c, d, 0xdd)}};
}
// rne(t) limited to 0..255, as bytes in order, for |t| < 2^31 in the order of interleaved taps: packing takes it back.
static inline BITDIAL_ALWAYS_INLINE Bytes pack_taps(const Floats& t) {
    const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(t.v[0]), _mm512_cvtps_epi32(t.v[1]));
    const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(t.v[2]), _mm512_cvtps_epi32(t.v[3]));
    return {_mm512_packus_epi16(low, high)};
}
// Into the order of interleaved taps: a transposition of 128-bit lanes, its own inverse.
static inline BITDIAL_ALWAYS_INLINE Ints interleaved(const Ints& x) { return in_order(x); }
static inline BITDIAL_ALWAYS_INLINE Floats interleaved(const Floats& x) {
    const Ints bits = {{_mm512_castps_si512(x.v[0]), _mm512_castps_si512(x.v[1]), _mm512_castps_si512(x.v[2]),
                        _mm512_castps_si512(x.v[3])}};
    const Ints ordered = in_order(bits);
    return {{_mm512_castsi512_ps(ordered.v[0]), _mm512_castsi512_ps(ordered.v[1]), _mm512_castsi512_ps(ordered.v[2]),
             _mm512_castsi512_ps(ordered.v[3])}};
}
static constexpr int32_t kColumnTile = 4;  // outputs of a tile in depthwise/columns_body.h
#define BITDIAL_TAP_COLUMNS

// 256-entry table held in four registers.
struct Table {
    __m512i v[4];
};
static inline BITDIAL_ALWAYS_INLINE Table load_table(const uint8_t* table) {
    Table t;
    for (int32_t k = 0; k < 4; ++k) t.v[k] = _mm512_loadu_si512(table + 64 * k);
    return t;
}
static inline BITDIAL_ALWAYS_INLINE Bytes look_up(const Table& table, const Bytes& index) {
    const __m512i low = _mm512_permutex2var_epi8(table.v[0], index.v, table.v[1]);
    const __m512i high = _mm512_permutex2var_epi8(table.v[2], index.v, table.v[3]);
    return {_mm512_mask_blend_epi8(_mm512_movepi8_mask(index.v), low, high)};
}

// Writes r0 g0 b0 r1 g1 b1 ... (3 * kBlock bytes).
struct Interleave3 {
    uint8_t pair[3][64], third[3][64];
    constexpr Interleave3() : pair(), third() {
        for (int32_t k = 0; k < 3; ++k) {
            for (int32_t i = 0; i < 64; ++i) {
                const int32_t pixel = (64 * k + i) / 3, channel = (64 * k + i) % 3;
                pair[k][i] = static_cast<uint8_t>(channel == 1 ? 64 + pixel : pixel);
                third[k][i] = static_cast<uint8_t>(channel == 2 ? 64 + pixel : i);
            }
        }
    }
};
static constexpr Interleave3 kInterleave3;
static inline BITDIAL_ALWAYS_INLINE void store_interleaved3(uint8_t* to, const Bytes& r, const Bytes& g, const Bytes& b) {
    for (int32_t k = 0; k < 3; ++k) {
        const __m512i rg = _mm512_permutex2var_epi8(r.v, _mm512_loadu_si512(kInterleave3.pair[k]), g.v);
        _mm512_storeu_si512(to + 64 * k, _mm512_permutex2var_epi8(rg, _mm512_loadu_si512(kInterleave3.third[k]), b.v));
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
