// The vectors of lanes.h with AVX2: 32 bytes at once, tails from two overlapping loads.
#pragma once
#include <cstdint>

#include "always_inline.h"
#include "intrinsics.h"

namespace bitdial {
namespace BITDIAL_ISA {

static constexpr int32_t kBlock = 32;

struct Bytes {
    __m256i v;
};
struct Floats {
    __m256 v[4];
};
struct Ints {
    __m256i v[4];
};

static inline BITDIAL_ALWAYS_INLINE Bytes load(const uint8_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
static inline BITDIAL_ALWAYS_INLINE void store(uint8_t* to, const Bytes& bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes.v);
}

// The first `count` < 8 bytes as the low bytes of an integer.
static inline BITDIAL_ALWAYS_INLINE uint64_t load_few(const uint8_t* from, int32_t count) {
    uint64_t r = 0;
    if (count >= 4) {
        uint32_t low, high;
        __builtin_memcpy(&low, from, 4);
        __builtin_memcpy(&high, from + count - 4, 4);
        r = low | (static_cast<uint64_t>(high) << (8 * (count - 4)));
    } else if (count > 0) {
        r = from[0] | (static_cast<uint64_t>(from[count / 2]) << (8 * (count / 2))) |
            (static_cast<uint64_t>(from[count - 1]) << (8 * (count - 1)));
    }
    return r;
}

static inline BITDIAL_ALWAYS_INLINE __m128i load_half(const uint8_t* from, int32_t count) {
    if (count >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (count < 8) return _mm_set_epi64x(0, static_cast<int64_t>(load_few(from, count)));
    uint64_t low;
    __builtin_memcpy(&low, from, 8);
    return _mm_set_epi64x(static_cast<int64_t>(load_few(from + 8, count - 8)), static_cast<int64_t>(low));
}

static inline BITDIAL_ALWAYS_INLINE Bytes load(const uint8_t* from, int32_t count) {
    if (count >= 32) return load(from);
    const __m128i low = load_half(from, count);
    const __m128i high = count > 16 ? load_half(from + 16, count - 16) : _mm_setzero_si128();
    return {_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1)};
}

static inline BITDIAL_ALWAYS_INLINE void store_half(uint8_t* to, __m128i half, int32_t count) {
    if (count >= 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
        return;
    }
    uint64_t word = static_cast<uint64_t>(_mm_cvtsi128_si64(half));
    if (count >= 8) {
        __builtin_memcpy(to, &word, 8);
        word = static_cast<uint64_t>(_mm_extract_epi64(half, 1));
        to += 8;
        count -= 8;
    }
    if (count >= 4) {
        __builtin_memcpy(to, &word, 4);
        word >>= 32;
        to += 4;
        count -= 4;
    }
    for (; count > 0; --count, word >>= 8) *to++ = static_cast<uint8_t>(word);
}

static inline BITDIAL_ALWAYS_INLINE void store(uint8_t* to, const Bytes& bytes, int32_t count) {
    store_half(to, _mm256_castsi256_si128(bytes.v), count);
    if (count > 16) store_half(to + 16, _mm256_extracti128_si256(bytes.v, 1), count - 16);
}

static inline BITDIAL_ALWAYS_INLINE Bytes fill(uint8_t value) { return {_mm256_set1_epi8(static_cast<char>(value))}; }
static inline BITDIAL_ALWAYS_INLINE Bytes maximum(const Bytes& a, const Bytes& b) { return {_mm256_max_epu8(a.v, b.v)}; }
static inline BITDIAL_ALWAYS_INLINE Bytes minimum(const Bytes& a, const Bytes& b) { return {_mm256_min_epu8(a.v, b.v)}; }
static inline BITDIAL_ALWAYS_INLINE Bytes add_wrapping(const Bytes& a, const Bytes& b) { return {_mm256_add_epi8(a.v, b.v)}; }

// Mask of the 32-bit elements of part k (8 elements each) when the block holds `count`.
static inline BITDIAL_ALWAYS_INLINE __m256i part_mask(int32_t count, int32_t k) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8 * k), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
static inline BITDIAL_ALWAYS_INLINE Floats load(const float* from) {
    return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8), _mm256_loadu_ps(from + 16), _mm256_loadu_ps(from + 24)}};
}
static inline BITDIAL_ALWAYS_INLINE Floats load(const float* from, int32_t count) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_maskload_ps(from + 8 * k, part_mask(count, k));
    return r;
}
static inline BITDIAL_ALWAYS_INLINE void store(float* to, const Floats& x) {
    for (int32_t k = 0; k < 4; ++k) _mm256_storeu_ps(to + 8 * k, x.v[k]);
}
static inline BITDIAL_ALWAYS_INLINE void store(float* to, const Floats& x, int32_t count) {
    for (int32_t k = 0; k < 4; ++k) _mm256_maskstore_ps(to + 8 * k, part_mask(count, k), x.v[k]);
}
static inline BITDIAL_ALWAYS_INLINE Ints load(const int32_t* from, int32_t count) {
    Ints r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_maskload_epi32(from + 8 * k, part_mask(count, k));
    return r;
}
static inline BITDIAL_ALWAYS_INLINE void store(int32_t* to, const Ints& x, int32_t count) {
    for (int32_t k = 0; k < 4; ++k) _mm256_maskstore_epi32(to + 8 * k, part_mask(count, k), x.v[k]);
}

static inline BITDIAL_ALWAYS_INLINE Floats fill(float value) {
    const __m256 v = _mm256_set1_ps(value);
    return {{v, v, v, v}};
}
static inline BITDIAL_ALWAYS_INLINE Floats multiply(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_mul_ps(a.v[k], b.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Floats add(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_add_ps(a.v[k], b.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Floats clamp(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_min_ps(_mm256_max_ps(t.v[k], lo.v[k]), hi.v[k]);
    return r;
}

static inline BITDIAL_ALWAYS_INLINE Floats subtract(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_sub_ps(a.v[k], b.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Floats divide(const Floats& a, const Floats& b) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_div_ps(a.v[k], b.v[k]);
    return r;
}
// The instructions give their second operand where one is NaN and where both are zeros.
static inline BITDIAL_ALWAYS_INLINE Floats bound(const Floats& t, const Floats& lo, const Floats& hi) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_min_ps(hi.v[k], _mm256_max_ps(lo.v[k], t.v[k]));
    return r;
}

struct Sixteen {
    __m256 v[2];
};
static inline BITDIAL_ALWAYS_INLINE Sixteen load16(const float* from) {
    return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}};
}
static inline BITDIAL_ALWAYS_INLINE Sixteen load16(const float* from, int32_t count) {
    return {{_mm256_maskload_ps(from, part_mask(count, 0)), _mm256_maskload_ps(from + 8, part_mask(count, 1))}};
}
static inline BITDIAL_ALWAYS_INLINE Sixteen fill16(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
static inline BITDIAL_ALWAYS_INLINE Sixteen add(const Sixteen& a, const Sixteen& b) {
    return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
static inline BITDIAL_ALWAYS_INLINE Sixteen subtract(const Sixteen& a, const Sixteen& b) {
    return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
}
static inline BITDIAL_ALWAYS_INLINE Sixteen multiply(const Sixteen& a, const Sixteen& b) {
    return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
}
static inline BITDIAL_ALWAYS_INLINE Sixteen first16(const Sixteen& x, int32_t count) {
    return {{_mm256_and_ps(x.v[0], _mm256_castsi256_ps(part_mask(count, 0))),
             _mm256_and_ps(x.v[1], _mm256_castsi256_ps(part_mask(count, 1)))}};
}
static inline BITDIAL_ALWAYS_INLINE float total(const Sixteen& x) {
    const __m256 eight = _mm256_add_ps(x.v[0], x.v[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Even dwords to the low lane, odd ones to the high lane: shuffles within lanes then yield elements in order. The float
// 2^23 + stored is built from bits.
static inline BITDIAL_ALWAYS_INLINE Floats values(const Bytes& bytes, int32_t zero) {
    const __m256i paired = _mm256_permutevar8x32_epi32(bytes.v, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
    const __m256i spread = _mm256_set_epi32(-253, -254, -255, -256, -253, -254, -255, -256);  // ffffff00 + element
    const __m256 offset = _mm256_set1_ps(8388608.0f + static_cast<float>(zero));
    Floats r;
    for (int32_t k = 0; k < 4; ++k) {
        const __m256i place = _mm256_add_epi32(spread, _mm256_set1_epi32(4 * k));
        const __m256i bits = _mm256_or_si256(_mm256_shuffle_epi8(paired, place), _mm256_set1_epi32(0x4B000000));
        r.v[k] = _mm256_sub_ps(_mm256_castsi256_ps(bits), offset);
    }
    return r;
}

static inline BITDIAL_ALWAYS_INLINE Bytes narrow(const Floats& t, const Bytes& zero) {
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[0]), _mm256_cvtps_epi32(t.v[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[2]), _mm256_cvtps_epi32(t.v[3]));
    const __m256i byte = _mm256_set1_epi16(0xff);  // the low byte of the value; adding zero wraps to the stored byte
    const __m256i paired = _mm256_packus_epi16(_mm256_and_si256(low, byte), _mm256_and_si256(high, byte));
    const __m256i ordered = _mm256_permutevar8x32_epi32(paired, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    return {_mm256_add_epi8(ordered, zero.v)};
}

static inline BITDIAL_ALWAYS_INLINE Floats to_floats(const Ints& x) {
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_cvtepi32_ps(x.v[k]);
    return r;
}
static inline BITDIAL_ALWAYS_INLINE Ints fill(int32_t value) {
    const __m256i v = _mm256_set1_epi32(value);
    return {{v, v, v, v}};
}
static inline BITDIAL_ALWAYS_INLINE Ints add(const Ints& a, const Ints& b) {
    Ints r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = _mm256_add_epi32(a.v[k], b.v[k]);
    return r;
}

struct Watch {
    __m256i largest;
};
static inline BITDIAL_ALWAYS_INLINE Watch start_watch() { return {_mm256_setzero_si256()}; }
static inline BITDIAL_ALWAYS_INLINE void watch(Watch& state, const Floats& x) {
    for (int32_t k = 0; k < 4; ++k) {
        const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x.v[k]), _mm256_set1_epi32(0x7fffffff));
        state.largest = _mm256_max_epi32(state.largest, bits);
    }
}
static inline BITDIAL_ALWAYS_INLINE bool any_nonfinite(const Watch& state) {
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(state.largest, _mm256_set1_epi32(0x7f7fffff))) != 0;
}

// Even and odd bytes are summed apart, without any shuffle.
struct Words {
    __m256i even, odd;
};
static inline BITDIAL_ALWAYS_INLINE Words zero_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline BITDIAL_ALWAYS_INLINE void accumulate(Words& words, const Bytes& bytes) {
    words.even = _mm256_add_epi16(words.even, _mm256_and_si256(bytes.v, _mm256_set1_epi16(0xff)));
    words.odd = _mm256_add_epi16(words.odd, _mm256_srli_epi16(bytes.v, 8));
}
static inline BITDIAL_ALWAYS_INLINE void gather_words(Ints& sums, const Words& words) {
    const __m256i a = _mm256_unpacklo_epi16(words.even, words.odd);  // elements 16 l + 0..7 of 128-bit lane l
    const __m256i b = _mm256_unpackhi_epi16(words.even, words.odd);  // 16 l + 8..15
    const __m128i part[4] = {_mm256_castsi256_si128(a), _mm256_castsi256_si128(b), _mm256_extracti128_si256(a, 1),
                             _mm256_extracti128_si256(b, 1)};
    for (int32_t k = 0; k < 4; ++k) sums.v[k] = _mm256_add_epi32(sums.v[k], _mm256_cvtepu16_epi32(part[k]));
}

// Two taps per 16-bit multiply-add. Interleaving leaves the elements of lane l of part k at 16 l + 4 k + 0..3; `in_order` turns
// sums back, `interleaved` does the opposite.
static constexpr int32_t kTapGroup = 2;
struct Taps {
    __m256i v[4];
};
// `high`: the upper bytes of the words.
static inline BITDIAL_ALWAYS_INLINE Taps interleave_words(__m256i a, __m256i b, __m256i high_a, __m256i high_b) {
    const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
    const __m256i above_low = _mm256_unpacklo_epi8(high_a, high_b), above_high = _mm256_unpackhi_epi8(high_a, high_b);
    return {{_mm256_unpacklo_epi8(low, above_low), _mm256_unpackhi_epi8(low, above_low),
             _mm256_unpacklo_epi8(high, above_high), _mm256_unpackhi_epi8(high, above_high)}};
}
static inline BITDIAL_ALWAYS_INLINE Taps pack_weights(const Bytes tap[2]) {
    const __m256i zero = _mm256_setzero_si256();
    return interleave_words(tap[0].v, tap[1].v, _mm256_cmpgt_epi8(zero, tap[0].v), _mm256_cmpgt_epi8(zero, tap[1].v));
}
static inline BITDIAL_ALWAYS_INLINE Taps interleave_taps(const Bytes tap[2]) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = _mm256_unpacklo_epi8(tap[0].v, tap[1].v), high = _mm256_unpackhi_epi8(tap[0].v, tap[1].v);
    return {{_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero), _mm256_unpacklo_epi8(high, zero),
             _mm256_unpackhi_epi8(high, zero)}};
}
static inline BITDIAL_ALWAYS_INLINE void dot_taps(Ints& sums, const Taps& words, const Taps& weights) {
    for (int32_t k = 0; k < 4; ++k) {
        sums.v[k] = _mm256_add_epi32(sums.v[k], _mm256_madd_epi16(words.v[k], weights.v[k]));
        __asm__("" : "+x"(sums.v[k]));  // GCC would make a tree of the additions, and spill the products
    }
}
static inline BITDIAL_ALWAYS_INLINE void multiply_taps(Ints& sums, const Bytes tap[2], const Taps& weights) {
    dot_taps(sums, interleave_taps(tap), weights);
}
static inline BITDIAL_ALWAYS_INLINE Ints in_order(const Ints& x) {
    return {{_mm256_permute2x128_si256(x.v[0], x.v[1], 0x20), _mm256_permute2x128_si256(x.v[2], x.v[3], 0x20),
             _mm256_permute2x128_si256(x.v[0], x.v[1], 0x31), _mm256_permute2x128_si256(x.v[2], x.v[3], 0x31)}};
}
static inline BITDIAL_ALWAYS_INLINE Ints interleaved(const Ints& x) {
    return {{_mm256_permute2x128_si256(x.v[0], x.v[2], 0x20), _mm256_permute2x128_si256(x.v[0], x.v[2], 0x31),
             _mm256_permute2x128_si256(x.v[1], x.v[3], 0x20), _mm256_permute2x128_si256(x.v[1], x.v[3], 0x31)}};
}
static inline BITDIAL_ALWAYS_INLINE Floats interleaved(const Floats& x) {
    return {{_mm256_permute2f128_ps(x.v[0], x.v[2], 0x20), _mm256_permute2f128_ps(x.v[0], x.v[2], 0x31),
             _mm256_permute2f128_ps(x.v[1], x.v[3], 0x20), _mm256_permute2f128_ps(x.v[1], x.v[3], 0x31)}};
}
// rne(t) limited to 0..255, as bytes in order, for |t| < 2^31 in the order of interleaved taps: packing takes it back.
static inline BITDIAL_ALWAYS_INLINE Bytes pack_taps(const Floats& t) {
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[0]), _mm256_cvtps_epi32(t.v[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[2]), _mm256_cvtps_epi32(t.v[3]));
    return {_mm256_packus_epi16(low, high)};
}
static constexpr int32_t kColumnTile = 2;  // outputs of a tile in depthwise/columns_body.h
#define BITDIAL_TAP_COLUMNS

// 256-entry table as 16 shuffles of 16 entries; bits 4..7 of the index choose among their results.
struct Table {
    __m256i v[16];
};
static inline BITDIAL_ALWAYS_INLINE Table load_table(const uint8_t* table) {
    Table t;
    for (int32_t k = 0; k < 16; ++k) {
        t.v[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * k)));
    }
    return t;
}
static inline BITDIAL_ALWAYS_INLINE Bytes look_up(const Table& table, const Bytes& index) {
    const __m256i place = _mm256_and_si256(index.v, _mm256_set1_epi8(15));
    const __m256i bit4 = _mm256_slli_epi16(index.v, 3), bit5 = _mm256_slli_epi16(index.v, 2);
    const __m256i bit6 = _mm256_slli_epi16(index.v, 1), bit7 = index.v;  // each at the top of its byte
    __m256i quarter[4];
    for (int32_t k = 0; k < 4; ++k) {
        const __m256i a = _mm256_shuffle_epi8(table.v[4 * k], place);
        const __m256i b = _mm256_shuffle_epi8(table.v[4 * k + 1], place);
        const __m256i c = _mm256_shuffle_epi8(table.v[4 * k + 2], place);
        const __m256i d = _mm256_shuffle_epi8(table.v[4 * k + 3], place);
        quarter[k] = _mm256_blendv_epi8(_mm256_blendv_epi8(a, b, bit4), _mm256_blendv_epi8(c, d, bit4), bit5);
    }
    const __m256i low = _mm256_blendv_epi8(quarter[0], quarter[1], bit6);
    const __m256i high = _mm256_blendv_epi8(quarter[2], quarter[3], bit6);
    return {_mm256_blendv_epi8(low, high, bit7)};
}

// Writes r0 g0 b0 r1 g1 b1 ... (3 * kBlock bytes).
struct Interleave3 {
    uint8_t place[3][3][16];  // [output][channel][byte]; 0x80 writes 0
    constexpr Interleave3() : place() {
        for (int32_t k = 0; k < 3; ++k) {
            for (int32_t i = 0; i < 16; ++i) {
                for (int32_t c = 0; c < 3; ++c) {
                    place[k][c][i] = static_cast<uint8_t>((16 * k + i) % 3 == c ? (16 * k + i) / 3 : 0x80);
                }
            }
        }
    }
};
static constexpr Interleave3 kInterleave3;
static inline BITDIAL_ALWAYS_INLINE __m128i half_of(const Bytes& bytes, int32_t k) {
    return k == 0 ? _mm256_castsi256_si128(bytes.v) : _mm256_extracti128_si256(bytes.v, 1);
}
static inline BITDIAL_ALWAYS_INLINE void store_interleaved3(uint8_t* to, const Bytes& r, const Bytes& g, const Bytes& b) {
    for (int32_t half = 0; half < 2; ++half) {
        const __m128i source[3] = {half_of(r, half), half_of(g, half), half_of(b, half)};
        for (int32_t k = 0; k < 3; ++k) {
            __m128i out = _mm_setzero_si128();
            for (int32_t c = 0; c < 3; ++c) {
                const __m128i place = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kInterleave3.place[k][c]));
                out = _mm_or_si128(out, _mm_shuffle_epi8(source[c], place));
            }
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 48 * half + 16 * k), out);
        }
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
