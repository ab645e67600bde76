// Blocks of bytes with NEON; see simd.h.
#pragma once

namespace bitdial {
namespace BITDIAL_ISA {

BITDIAL_INLINE uint8x16_t neon_bytes(vi a) { return reinterpret_cast<uint8x16_t>(a); }

BITDIAL_INLINE Floats values(vi bytes, int32_t zero) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(neon_bytes(bytes))), high = vmovl_u8(vget_high_u8(neon_bytes(bytes)));
    const uint32x4_t part[4] = {vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)), vmovl_u16(vget_low_u16(high)),
                                vmovl_u16(vget_high_u16(high))};
    Floats r;
    for (int32_t k = 0; k < 4; ++k) r.v[k] = to_float(sub(reinterpret_cast<vi>(part[k]), set(zero)));
    return r;
}

BITDIAL_INLINE vi narrow(const Floats& t, vi zero) {
    uint8x8_t half[2];
    for (int32_t k = 0; k < 2; ++k) {
        const uint32x4_t a = reinterpret_cast<uint32x4_t>(round_even(t.v[2 * k])), b = reinterpret_cast<uint32x4_t>(round_even(t.v[2 * k + 1]));
        half[k] = vmovn_u16(vcombine_u16(vmovn_u32(a), vmovn_u32(b)));  // low bytes; adding zero wraps to the stored byte
    }
    return add_bytes(reinterpret_cast<vi>(vcombine_u8(half[0], half[1])), zero);
}

struct Words {
    uint16x8_t low, high;
};
BITDIAL_INLINE Words zero_words() { return {vdupq_n_u16(0), vdupq_n_u16(0)}; }
BITDIAL_INLINE void accumulate(Words& words, vi bytes) {
    words.low = vaddw_u8(words.low, vget_low_u8(neon_bytes(bytes)));
    words.high = vaddw_u8(words.high, vget_high_u8(neon_bytes(bytes)));
}
BITDIAL_INLINE void gather_words(Ints& sums, const Words& words) {
    const uint16x4_t part[4] = {vget_low_u16(words.low), vget_high_u16(words.low), vget_low_u16(words.high),
                                vget_high_u16(words.high)};
    for (int32_t k = 0; k < 4; ++k) sums.v[k] = add(sums.v[k], reinterpret_cast<vi>(vmovl_u16(part[k])));
}

// One tap at a time, widened to 16 bits; everything stays in order.
static constexpr int32_t kTapGroup = 1;
struct Taps {
    int16x8_t low, high;
};
BITDIAL_INLINE Taps pack_weights(const vi tap[1]) {
    const int8x16_t w = reinterpret_cast<int8x16_t>(tap[0]);
    return {vmovl_s8(vget_low_s8(w)), vmovl_s8(vget_high_s8(w))};
}
BITDIAL_INLINE Taps interleave_taps(const vi tap[1]) {
    return {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(neon_bytes(tap[0])))),
            vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(neon_bytes(tap[0]))))};
}
BITDIAL_INLINE vi add_product(vi sum_, int16x4_t a, int16x4_t b) {
    return reinterpret_cast<vi>(vmlal_s16(reinterpret_cast<int32x4_t>(sum_), a, b));
}
BITDIAL_INLINE void dot_taps(Ints& sums, const Taps& bytes, const Taps& weights) {
    sums.v[0] = add_product(sums.v[0], vget_low_s16(bytes.low), vget_low_s16(weights.low));
    sums.v[1] = add_product(sums.v[1], vget_high_s16(bytes.low), vget_high_s16(weights.low));
    sums.v[2] = add_product(sums.v[2], vget_low_s16(bytes.high), vget_low_s16(weights.high));
    sums.v[3] = add_product(sums.v[3], vget_high_s16(bytes.high), vget_high_s16(weights.high));
}
BITDIAL_INLINE void multiply_taps(Ints& sums, const vi tap[1], const Taps& weights) {
    dot_taps(sums, interleave_taps(tap), weights);
}
BITDIAL_INLINE Ints in_order(const Ints& x) { return x; }
BITDIAL_INLINE Ints interleaved(const Ints& x) { return x; }
BITDIAL_INLINE Floats interleaved(const Floats& x) { return x; }
// rne(t) limited to 0..255, as bytes, for |t| < 2^31.
BITDIAL_INLINE vi pack_taps(const Floats& t) {
    const int16x8_t low = limited_words(round_even(t.v[0]), round_even(t.v[1]));
    const int16x8_t high = limited_words(round_even(t.v[2]), round_even(t.v[3]));
    return reinterpret_cast<vi>(vcombine_u8(vqmovun_s16(low), vqmovun_s16(high)));
}
static constexpr int32_t kColumnTile = 2;  // outputs of a tile in depthwise/columns_body.h
#define BITDIAL_TAP_COLUMNS 1

// 256-entry table as four of 64: what lies beyond a table leaves the result so far.
struct Table {
    uint8x16x4_t v[4];
};
BITDIAL_INLINE Table load_table(const uint8_t* table) {
    return {{vld1q_u8_x4(table), vld1q_u8_x4(table + 64), vld1q_u8_x4(table + 128), vld1q_u8_x4(table + 192)}};
}
BITDIAL_INLINE vi look_up(const Table& table, vi index) {
    const uint8x16_t place = neon_bytes(index);
    uint8x16_t r = vqtbl4q_u8(table.v[0], place);
    for (int32_t k = 1; k < 4; ++k) r = vqtbx4q_u8(r, table.v[k], vsubq_u8(place, vdupq_n_u8(static_cast<uint8_t>(64 * k))));
    return reinterpret_cast<vi>(r);
}

// Writes r0 g0 b0 r1 g1 b1 ... (3 * BYTES bytes).
BITDIAL_INLINE void store_interleaved3(uint8_t* to, vi r, vi g, vi b) {
    const uint8x16x3_t planes = {{neon_bytes(r), neon_bytes(g), neon_bytes(b)}};
    vst3q_u8(to, planes);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
