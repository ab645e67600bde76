// Convolution pixel by pixel: low groups by the fast inner product, as narrow operands or read back. Low weights that are not kept
// are derived block by block.
#pragma once
#include "extract_body.h"
#include "high_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

// Sum over the low octets of one pixel of (x1 + c) x2, shifted: what the fast inner product must subtract, as lanes.
static inline vi pair_products(const uint8_t* x, const ConvArgs& c, int c_offset) {
    vi total = zero();
    const vi offset = set_bytes(c_offset);
    for (int32_t b = 0, l = 0; b < c.low_bytes; b += BYTES, l += LANES) {
        const vi u = load(x + b);
        const vi d = dot(zero(), u, sub_bytes(swap_fours(u), offset));
        total = add(total, shift_left_each(both(d, load(c.lane_mask + l)), load(c.lane_shift + l)));
    }
    return total;
}

// Bytes of one extracted pixel in scratch memory; the fast inner product reads whole vectors.
static inline int64_t extracted_row(const ConvArgs& c) {
    return c.extract_here ? int64_t(ceil_div(c.extraction.src.c, BYTES)) * BYTES : 0;
}

// Where derive_block reads: low weights at byte `b` of a group's dot form.
struct Derived {
    const uint8_t* from;
    int32_t shift, wmax;
    inline vi operator()(int64_t b) const { return low_weights(load(from + b), shift, wmax); }
};
struct StoredBytes {
    const uint8_t* from;
    inline vi operator()(int64_t b) const { return load(from + b); }
};
struct StoredNibbles {
    const uint8_t* from;
    inline vi operator()(int64_t b) const {
        const int64_t at = b / BYTES;
        vi v = load(from + at / 2 * BYTES);
        if (at % 2) v = shift_right_2(shift_right_2(v));  // what comes in from the next byte is masked away
        const vi eight = set_bytes(8);
        return sub_bytes(both(add_bytes(v, eight), set_bytes(15)), eight);
    }
};

// A group's low weights into `o`. Dot form: [tap][quad][BLOCK][4]; fip form: half h of the block's outputs, octets with the
// first four channels less the offset.
template <class Source>
static inline void derive_group(const ConvArgs& c, const Source& low, int32_t quads, int32_t half, uint8_t* o) {
    const int64_t quad = 4 * BLOCK, part = 4 * FIP_BLOCK;
    if (c.method != METHOD_FIP) {
        for (int64_t b = 0; b < c.taps * quads * quad; b += BYTES) store(o + b, low(b));
        return;
    }
    const vi offset = set_bytes(c.low_offset);
    for (int32_t t = 0; t < c.taps; t++)
        for (int32_t u = 0; u < quads; u += 2, o += 2 * part) {
            const int64_t first = (int64_t(t) * quads + u) * quad + half * part;
            for (int64_t b = 0; b < part; b += BYTES) {
                store(o + b, sub_bytes(low(first + b), offset));
                store(o + part + b, u + 1 < quads ? low(first + quad + b) : zero());
            }
        }
}

// Low weights of one block (fip: of half h of its outputs) into `to`.
static void derive_block(const ConvArgs& c, int32_t block, int32_t half, int8_t* to) {
    const int8_t* from = c.plane.weights ? c.plane.weights + block * c.plane.block_bytes : c.high_weights + block * c.high_block_bytes;
    for (int32_t g = 0; g < c.derive_groups; g++) {
        const DeriveGroup& d = c.derive[g];
        const uint8_t* w = reinterpret_cast<const uint8_t*>(from) + d.from;
        uint8_t* o = reinterpret_cast<uint8_t*>(to) + d.to;
        if (!c.plane.weights)
            derive_group(c, Derived{w, d.shift, c.wmax}, d.quads, half, o);
        else if (c.plane.nibbles)
            derive_group(c, StoredNibbles{w}, d.quads, half, o);
        else
            derive_group(c, StoredBytes{w}, d.quads, half, o);
    }
}

static void run_pixels(const ConvArgs& c, int32_t chunk, int32_t block0, int32_t block1, const Scratch& scratch,
                       Counters* counters) {
    const int32_t all = c.batch * c.out_h * c.out_w;
    const int32_t p0 = chunk * c.chunk, p1 = p0 + c.chunk < all ? p0 + c.chunk : all, count = p1 - p0;
    uint8_t* memory = scratch.memory;
    Pixel* pixels = take<Pixel>(memory, count);
    const uint8_t** in = take<const uint8_t*>(memory, count);
    const uint8_t** low = take<const uint8_t*>(memory, count);
    int32_t* row = take<int32_t>(memory, count);
    int32_t* sums = take<int32_t>(memory, int64_t(BLOCK) * count);  // [count][BLOCK]
    const int64_t extracted_pitch = extracted_row(c);
    uint8_t* extracted = take<uint8_t>(memory, extracted_pitch * count);
    int8_t* derived = take<int8_t>(memory, 0);  // one block of low weights

    const bool fip = HAS_FIP && c.low_groups.count && c.method == METHOD_FIP;
    const bool narrow = c.low_groups.count && c.method == METHOD_NARROW;
    int32_t n = p0 / (c.out_h * c.out_w), y = p0 / c.out_w % c.out_h, x = p0 % c.out_w;
    const int64_t in_step = c.stride_w * c.src.pitch_x, out_step = c.out.pitch_x;
    const int64_t residual_step = c.residual.data ? c.residual.pitch_x : 0;
    for (int32_t begin = 0; begin < count;) {  // a row of the image, or what is left of it
        const int32_t run = count - begin < c.out_w - x ? count - begin : c.out_w - x;
        const Pixel first = pixel_at(c, n, y, x);
        const uint8_t* from = input_at(c, c.src, n, y, x);
        for (int32_t i = 0; i < run; i++) {
            pixels[begin + i] = {first.out + i * out_step, first.residual + i * residual_step};
            in[begin + i] = from + i * in_step;
        }
        if (c.extract_here) {
            uint8_t* own = extracted + begin * extracted_pitch;
            extract_run(c.extraction, from, in_step, own, extracted_pitch, run);
            for (int32_t i = 0; i < run; i++, own += extracted_pitch) {
                // The rest of a short octet stays in range, or sums of bytes would wrap: scratch memory holds anything.
                if (fip)
                    for (int32_t b = c.extraction.src.c; b % 8; b++) own[b] = static_cast<uint8_t>(c.low_offset);
                low[begin + i] = own;
                if (!fip && !narrow) in[begin + i] = own;
            }
        } else if (fip || narrow) {
            for (int32_t i = 0; i < run; i++) low[begin + i] = input_at(c, c.low, n, y, x + i);
        }
        if (fip)
            for (int32_t i = begin; i < begin + run; i++) {
                vi total = zero();
                for (int32_t t = 0; t < c.taps; t++) total = add(total, pair_products(low[i] + c.low_taps[t], c, c.low_offset));
                row[i] = sum(total);
            }
        begin += run;
        x = 0;
        if (++y == c.out_h) y = 0, n++;
    }
    const Tiling dots(count, ROWS), fips(count, FIP_ROWS);
    const int64_t fip_step = ahead_step(c.low_block_bytes, fips.tiles), dot_step = ahead_step(c.low_block_bytes, dots.tiles);
    for (int32_t b = block0; b < block1; b++) {
        const int32_t k = b * BLOCK;
        const int32_t outputs = c.outputs - k < BLOCK ? c.outputs - k : BLOCK;
        if (fip) {
            int32_t* into = c.high.count ? sums : nullptr;
            for (int32_t h = 0; h * FIP_BLOCK < outputs; h++) {
                const int8_t* w = c.derive ? derived : c.low_weights + (b * (BLOCK / FIP_BLOCK) + h) * c.low_block_bytes;
                if (c.derive) derive_block(c, b, h, derived);
                for (int32_t t = 0, i = 0, rows; t < fips.tiles; t++, i += rows) {
                    rows = fips.rows(t);
                    fip_rows(rows, c, c.low_groups, w, c.taps, c.low_taps,
                             (c.derive ? w : w + c.low_block_bytes) + t * fip_step, low + i, row + i,
                             into ? into + int64_t(i) * BLOCK + h * FIP_BLOCK : nullptr, BLOCK, k + h * FIP_BLOCK, pixels + i);
                }
            }
            const int64_t macs = int64_t(count) * outputs * c.low_groups.channels * c.taps;
            counters->low += macs;
            counters->multiplications += macs / 2;
        }
        if (narrow) {
            const int8_t* w = c.derive ? derived : c.low_weights + b * c.low_block_bytes;
            if (c.derive) derive_block(c, b, 0, derived);
            for (int32_t t = 0, i = 0, rows; t < dots.tiles; t++, i += rows) {
                rows = dots.rows(t);
                dot_rows<true>(rows, outputs, c, c.low_groups, w, c.taps, c.low_taps,
                               (c.derive ? w : w + c.low_block_bytes) + t * dot_step, low + i, nullptr,
                               c.high.count ? sums + int64_t(i) * BLOCK : nullptr, k, pixels + i);
            }
            const int64_t macs = int64_t(count) * outputs * c.low_groups.channels * c.taps;
            counters->low += macs;
            counters->multiplications += macs;
        }
        if (c.high.count) {
            high_tiles(count, outputs, c, b, in, fip || narrow ? sums : nullptr, pixels);
            count_dot(c, count, outputs, counters);
        }
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
