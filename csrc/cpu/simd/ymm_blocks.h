// Blocks of bytes in 256-bit registers; see simd.h.
#pragma once

namespace bitdial {
namespace BITDIAL_ISA {

// Even dwords to the low lane, odd ones to the high lane: shuffles within lanes then yield elements in order. The float
// 2^23 + stored is built from bits.
BITDIAL_INLINE Floats values(vi bytes, int32_t zero) {
    const __m256i paired = _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
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

BITDIAL_INLINE vi narrow(const Floats& t, vi zero) {
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[0]), _mm256_cvtps_epi32(t.v[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[2]), _mm256_cvtps_epi32(t.v[3]));
    const __m256i byte = _mm256_set1_epi16(0xff);  // the low byte of the value; adding zero wraps to the stored byte
    const __m256i paired = _mm256_packus_epi16(_mm256_and_si256(low, byte), _mm256_and_si256(high, byte));
    const __m256i ordered = _mm256_permutevar8x32_epi32(paired, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    return _mm256_add_epi8(ordered, zero);
}

// Even and odd bytes are summed apart, without any shuffle.
struct Words {
    __m256i even, odd;
};
BITDIAL_INLINE Words zero_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
BITDIAL_INLINE void accumulate(Words& words, vi bytes) {
    words.even = _mm256_add_epi16(words.even, _mm256_and_si256(bytes, _mm256_set1_epi16(0xff)));
    words.odd = _mm256_add_epi16(words.odd, _mm256_srli_epi16(bytes, 8));
}
BITDIAL_INLINE void gather_words(Ints& sums, const Words& words) {
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
BITDIAL_INLINE Taps interleave_words(__m256i a, __m256i b, __m256i high_a, __m256i high_b) {
    const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
    const __m256i above_low = _mm256_unpacklo_epi8(high_a, high_b), above_high = _mm256_unpackhi_epi8(high_a, high_b);
    return {{_mm256_unpacklo_epi8(low, above_low), _mm256_unpackhi_epi8(low, above_low),
             _mm256_unpacklo_epi8(high, above_high), _mm256_unpackhi_epi8(high, above_high)}};
}
BITDIAL_INLINE Taps pack_weights(const vi tap[2]) {
    const __m256i zero = _mm256_setzero_si256();
    return interleave_words(tap[0], tap[1], _mm256_cmpgt_epi8(zero, tap[0]), _mm256_cmpgt_epi8(zero, tap[1]));
}
BITDIAL_INLINE Taps interleave_taps(const vi tap[2]) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = _mm256_unpacklo_epi8(tap[0], tap[1]), high = _mm256_unpackhi_epi8(tap[0], tap[1]);
    return {{_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero), _mm256_unpacklo_epi8(high, zero),
             _mm256_unpackhi_epi8(high, zero)}};
}
BITDIAL_INLINE void dot_taps(Ints& sums, const Taps& words, const Taps& weights) {
    for (int32_t k = 0; k < 4; ++k) {
        sums.v[k] = _mm256_add_epi32(sums.v[k], _mm256_madd_epi16(words.v[k], weights.v[k]));
        __asm__("" : "+x"(sums.v[k]));  // GCC would make a tree of the additions, and spill the products
    }
}
BITDIAL_INLINE void multiply_taps(Ints& sums, const vi tap[2], const Taps& weights) {
    dot_taps(sums, interleave_taps(tap), weights);
}
BITDIAL_INLINE Ints in_order(const Ints& x) {
    return {{_mm256_permute2x128_si256(x.v[0], x.v[1], 0x20), _mm256_permute2x128_si256(x.v[2], x.v[3], 0x20),
             _mm256_permute2x128_si256(x.v[0], x.v[1], 0x31), _mm256_permute2x128_si256(x.v[2], x.v[3], 0x31)}};
}
BITDIAL_INLINE Ints interleaved(const Ints& x) {
    return {{_mm256_permute2x128_si256(x.v[0], x.v[2], 0x20), _mm256_permute2x128_si256(x.v[0], x.v[2], 0x31),
             _mm256_permute2x128_si256(x.v[1], x.v[3], 0x20), _mm256_permute2x128_si256(x.v[1], x.v[3], 0x31)}};
}
BITDIAL_INLINE Floats interleaved(const Floats& x) {
    return {{_mm256_permute2f128_ps(x.v[0], x.v[2], 0x20), _mm256_permute2f128_ps(x.v[0], x.v[2], 0x31),
             _mm256_permute2f128_ps(x.v[1], x.v[3], 0x20), _mm256_permute2f128_ps(x.v[1], x.v[3], 0x31)}};
}
// rne(t) limited to 0..255, as bytes in order, for |t| < 2^31 in the order of interleaved taps: packing takes it back.
BITDIAL_INLINE vi pack_taps(const Floats& t) {
    const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[0]), _mm256_cvtps_epi32(t.v[1]));
    const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[2]), _mm256_cvtps_epi32(t.v[3]));
    return _mm256_packus_epi16(low, high);
}
static constexpr int32_t kColumnTile = 2;  // outputs of a tile in depthwise/columns_body.h
#define BITDIAL_TAP_COLUMNS 1

// 256-entry table as 16 shuffles of 16 entries; bits 4..7 of the index choose among their results.
struct Table {
    __m256i v[16];
};
BITDIAL_INLINE Table load_table(const uint8_t* table) {
    Table t;
    for (int32_t k = 0; k < 16; ++k) {
        t.v[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * k)));
    }
    return t;
}
BITDIAL_INLINE vi look_up(const Table& table, vi index) {
    const __m256i place = _mm256_and_si256(index, _mm256_set1_epi8(15));
    const __m256i bit4 = _mm256_slli_epi16(index, 3), bit5 = _mm256_slli_epi16(index, 2);
    const __m256i bit6 = _mm256_slli_epi16(index, 1), bit7 = index;  // each at the top of its byte
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
    return _mm256_blendv_epi8(low, high, bit7);
}

// Writes r0 g0 b0 r1 g1 b1 ... (3 * BYTES bytes).
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
BITDIAL_INLINE __m128i half_of(vi bytes, int32_t k) {
    return k == 0 ? _mm256_castsi256_si128(bytes) : _mm256_extracti128_si256(bytes, 1);
}
BITDIAL_INLINE void store_interleaved3(uint8_t* to, vi r, vi g, vi b) {
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
