// Blocks of bytes with AVX512; see simd.h.
#pragma once

namespace bitdial {
namespace avx512vnni {

// One permutation builds the float 2^23 + stored: the byte in the lowest place, 0x4B000000 around it.
BITDIAL_INLINE Floats values(vi bytes, int32_t zero) {
    const __m512i frame = _mm512_set1_epi32(0x4B000000);
    const __m512i index = _mm512_add_epi32(
        _mm512_set1_epi32(0x43404000), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512 offset = _mm512_set1_ps(8388608.0f + static_cast<float>(zero));
    Floats r;
    for (int32_t k = 0; k < 4; ++k) {
        const __m512i place = _mm512_add_epi32(index, _mm512_set1_epi32(16 * k));
        r.v[k] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_permutex2var_epi8(bytes, place, frame)), offset);
    }
    return r;
}

// Adding 1.5 * 2^23 rounds to an integer and leaves its low byte in the lowest place.
BITDIAL_INLINE vi narrow(const Floats& t, vi zero) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    const __m512i index = _mm512_set_epi32(
        0, 0, 0, 0, 0, 0, 0, 0, 0x7c787470, 0x6c686460, 0x5c585450, 0x4c484440, 0x3c383430, 0x2c282420, 0x1c181410,
        0x0c080400);
    __m512i u[4];
    for (int32_t k = 0; k < 4; ++k) u[k] = _mm512_castps_si512(_mm512_add_ps(t.v[k], magic));
    const __m512i low = _mm512_permutex2var_epi8(u[0], index, u[1]);
    const __m512i high = _mm512_permutex2var_epi8(u[2], index, u[3]);
    return _mm512_add_epi8(_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1), zero);
}

// Even and odd bytes are summed apart, without any shuffle.
struct Words {
    __m512i even, odd;
};
BITDIAL_INLINE Words zero_words() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
BITDIAL_INLINE void accumulate(Words& words, vi bytes) {
    words.even = _mm512_add_epi16(words.even, _mm512_and_si512(bytes, _mm512_set1_epi16(0xff)));
    words.odd = _mm512_add_epi16(words.odd, _mm512_srli_epi16(bytes, 8));
}
BITDIAL_INLINE void gather_words(Ints& sums, const Words& words) {
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
BITDIAL_INLINE Taps interleave_taps(const vi tap[4]) {
    const __m512i low01 = _mm512_unpacklo_epi8(tap[0], tap[1]), high01 = _mm512_unpackhi_epi8(tap[0], tap[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(tap[2], tap[3]), high23 = _mm512_unpackhi_epi8(tap[2], tap[3]);
    return {{_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
             _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)}};
}
BITDIAL_INLINE Taps pack_weights(const vi tap[4]) { return interleave_taps(tap); }
BITDIAL_INLINE void dot_taps(Ints& sums, const Taps& bytes, const Taps& weights) {
    for (int32_t k = 0; k < 4; ++k) sums.v[k] = _mm512_dpbusd_epi32(sums.v[k], bytes.v[k], weights.v[k]);
}
BITDIAL_INLINE void multiply_taps(Ints& sums, const vi tap[4], const Taps& weights) {
    dot_taps(sums, interleave_taps(tap), weights);
}
BITDIAL_INLINE Ints in_order(const Ints& x) {
    const __m512i a = _mm512_shuffle_i32x4(x.v[0], x.v[1], 0x44), b = _mm512_shuffle_i32x4(x.v[2], x.v[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(x.v[0], x.v[1], 0xee), d = _mm512_shuffle_i32x4(x.v[2], x.v[3], 0xee);
    return {{_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0x88),
             _mm512_shuffle_i32x4(c, d, 0xdd)}};
}
// rne(t) limited to 0..255, as bytes in order, for |t| < 2^31 in the order of interleaved taps: packing takes it back.
BITDIAL_INLINE vi pack_taps(const Floats& t) {
    const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(t.v[0]), _mm512_cvtps_epi32(t.v[1]));
    const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(t.v[2]), _mm512_cvtps_epi32(t.v[3]));
    return _mm512_packus_epi16(low, high);
}
// Into the order of interleaved taps: a transposition of 128-bit lanes, its own inverse.
BITDIAL_INLINE Ints interleaved(const Ints& x) { return in_order(x); }
BITDIAL_INLINE Floats interleaved(const Floats& x) {
    const Ints bits = {{_mm512_castps_si512(x.v[0]), _mm512_castps_si512(x.v[1]), _mm512_castps_si512(x.v[2]),
                        _mm512_castps_si512(x.v[3])}};
    const Ints ordered = in_order(bits);
    return {{_mm512_castsi512_ps(ordered.v[0]), _mm512_castsi512_ps(ordered.v[1]), _mm512_castsi512_ps(ordered.v[2]),
             _mm512_castsi512_ps(ordered.v[3])}};
}
static constexpr int32_t kColumnTile = 4;  // outputs of a tile in depthwise/columns_body.h
#define BITDIAL_TAP_COLUMNS 1

// 256-entry table held in four registers.
struct Table {
    __m512i v[4];
};
BITDIAL_INLINE Table load_table(const uint8_t* table) {
    Table t;
    for (int32_t k = 0; k < 4; ++k) t.v[k] = _mm512_loadu_si512(table + 64 * k);
    return t;
}
BITDIAL_INLINE vi look_up(const Table& table, vi index) {
    const __m512i low = _mm512_permutex2var_epi8(table.v[0], index, table.v[1]);
    const __m512i high = _mm512_permutex2var_epi8(table.v[2], index, table.v[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

// Writes r0 g0 b0 r1 g1 b1 ... (3 * BYTES bytes).
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
BITDIAL_INLINE void store_interleaved3(uint8_t* to, vi r, vi g, vi b) {
    for (int32_t k = 0; k < 3; ++k) {
        const __m512i rg = _mm512_permutex2var_epi8(r, _mm512_loadu_si512(kInterleave3.pair[k]), g);
        _mm512_storeu_si512(to + 64 * k, _mm512_permutex2var_epi8(rg, _mm512_loadu_si512(kInterleave3.third[k]), b));
    }
}

}  // namespace avx512vnni
}  // namespace bitdial
