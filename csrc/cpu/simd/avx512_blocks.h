// The blocks of bytes that products take with AVX-512 alone; all else is AVX2's. See simd.h.
#pragma once

namespace bitdial {
namespace avx512 {

// 256-entry table as 16 shuffles of 16 entries; the top half of the index chooses among their results.
struct Table {
    vi v[16];
};
BITDIAL_INLINE Table load_table(const uint8_t* table) {
    Table t;
    for (int32_t k = 0; k < 16; ++k)
        t.v[k] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * k)));
    return t;
}
BITDIAL_INLINE vi look_up(const Table& table, vi index) {
    const vi row = _mm512_and_si512(_mm512_srli_epi16(index, 4), set_bytes(15)), place = _mm512_and_si512(index, set_bytes(15));
    vi r = zero();
    for (int32_t k = 0; k < 16; ++k)
        r = _mm512_mask_shuffle_epi8(r, _mm512_cmpeq_epi8_mask(row, set_bytes(k)), table.v[k], place);
    return r;
}

}  // namespace avx512
}  // namespace bitdial
