// Blocks of bytes in plain C++; see simd.h. Conversions between bytes and floats, which compilers do badly from plain code, have a
// form for x86's base instructions.
#pragma once

namespace bitdial {
namespace portable {

#if defined(__SSE2__)
// Unpacking with zeros widens; packing with saturation narrows (values lie in -127..255, bytes after masking).
BITDIAL_INLINE Floats values(vi bytes, int32_t zero) {
    const __m128i none = _mm_setzero_si128(), offset = _mm_set1_epi32(zero), b = reinterpret_cast<__m128i>(bytes);
    const __m128i words[2] = {_mm_unpacklo_epi8(b, none), _mm_unpackhi_epi8(b, none)};
    Floats r;
    for (int32_t k = 0; k < 4; ++k) {
        const __m128i w = words[k / 2], wide = k % 2 == 0 ? _mm_unpacklo_epi16(w, none) : _mm_unpackhi_epi16(w, none);
        r.v[k] = _mm_cvtepi32_ps(_mm_sub_epi32(wide, offset));
    }
    return r;
}
BITDIAL_INLINE vi narrow(const Floats& t, vi zero) {
    const __m128i byte = _mm_set1_epi16(0xff);
    const __m128i low = _mm_packs_epi32(_mm_cvtps_epi32(t.v[0]), _mm_cvtps_epi32(t.v[1]));
    const __m128i high = _mm_packs_epi32(_mm_cvtps_epi32(t.v[2]), _mm_cvtps_epi32(t.v[3]));
    const __m128i values = _mm_packus_epi16(_mm_and_si128(low, byte), _mm_and_si128(high, byte));
    return add_bytes(reinterpret_cast<vi>(values), zero);
}
#else
BITDIAL_INLINE Floats values(vi bytes, int32_t zero) {
    uint8_t stored[16];
    __builtin_memcpy(stored, &bytes, 16);
    float value[16];
    for (int32_t i = 0; i < 16; ++i) value[i] = static_cast<float>(static_cast<int32_t>(stored[i]) - zero);
    return load_block<Floats>(value);
}

// Adding 1.5 * 2^23 rounds to an integer (floats are computed as floats; no wider arithmetic is in use) whose low byte is
// that of the float's bits.
BITDIAL_INLINE vi narrow(const Floats& t, vi zero) {
    uint32_t bits[16];
    for (int32_t k = 0; k < 4; ++k) {
        const vf shifted = t.v[k] + 12582912.0f;
        __builtin_memcpy(bits + 4 * k, &shifted, 16);
    }
    uint8_t low[16];
    for (int32_t i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>(bits[i]);
    return add_bytes(load(low), zero);
}
#endif

// Bytes of even and odd address are summed apart.
struct Words {
    WordVector even, odd;
};
BITDIAL_INLINE Words zero_words() { return {WordVector{}, WordVector{}}; }
BITDIAL_INLINE void accumulate(Words& words, vi bytes) {
    const WordVector pairs = reinterpret_cast<WordVector>(bytes);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    words.even += pairs & 0xff;
    words.odd += pairs >> 8;
#else
    words.even += pairs >> 8;
    words.odd += pairs & 0xff;
#endif
}
BITDIAL_INLINE void gather_words(Ints& sums, const Words& words) {
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
BITDIAL_INLINE Taps pack_weights(const vi tap[1]) {
    Taps r;
    const ByteVector bytes = bytes_of(tap[0]);
    for (int32_t i = 0; i < 16; ++i) r.v[i] = static_cast<int8_t>(bytes[i]);
    return r;
}
BITDIAL_INLINE void multiply_taps(Ints& sums, const vi tap[1], const Taps& weights) {
    uint8_t stored[16];
    __builtin_memcpy(stored, tap, 16);
    int16_t words[16];
    for (int32_t i = 0; i < 16; ++i) words[i] = static_cast<int16_t>(stored[i] * weights.v[i]);
    int32_t product[16];
    for (int32_t i = 0; i < 16; ++i) product[i] = words[i];
    sums = add(sums, load_block<Ints>(product));
}
BITDIAL_INLINE Ints in_order(const Ints& x) { return x; }

struct Table {
    const uint8_t* entries;
};
BITDIAL_INLINE Table load_table(const uint8_t* table) { return {table}; }
BITDIAL_INLINE vi look_up(const Table& table, vi index) {
    uint8_t place[16], found[16];
    __builtin_memcpy(place, &index, 16);
    for (int32_t i = 0; i < 16; ++i) found[i] = table.entries[place[i]];
    return load(found);
}

// Writes r0 g0 b0 r1 g1 b1 ... (3 * BYTES bytes).
BITDIAL_INLINE void store_interleaved3(uint8_t* to, vi r, vi g, vi b) {
    uint8_t plane[3][16];
    __builtin_memcpy(plane[0], &r, 16);
    __builtin_memcpy(plane[1], &g, 16);
    __builtin_memcpy(plane[2], &b, 16);
    for (int32_t i = 0; i < 16; ++i) {
        for (int32_t c = 0; c < 3; ++c) to[3 * i + c] = plane[c][i];
    }
}

}  // namespace portable
}  // namespace bitdial
