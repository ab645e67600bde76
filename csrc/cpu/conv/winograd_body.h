// Winograd F(2x2, 3x3) for the low groups, also with the fast inner product.
#pragma once
#include "high_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

// One row of positions: 4 combinations of a row of B^T d, each stored with its offset; `centre` is taken off the second one.
// With FIP also what the fast inner product subtracts, u1 * u2 of the pairs, combined along the row as the output transform
// does: left and right column.
template <bool FIP>
BITDIAL_INLINE void transform_row(const vi (&d)[4], const uint8_t* offsets, uint8_t* to,
                                                                int64_t stride, vi& left, vi& right, vi centre) {
    const vi v0 = sub_bytes(d[0], d[2]), v1 = sub_bytes(add_bytes(d[1], d[2]), centre), v2 = sub_bytes(d[2], d[1]), v3 = sub_bytes(d[1], d[3]);
    const vi u0 = add_bytes(v0, load(offsets)), u1 = add_bytes(v1, load(offsets + BYTES));
    const vi u2 = add_bytes(v2, load(offsets + 2 * BYTES)), u3 = add_bytes(v3, load(offsets + 3 * BYTES));
    store(to, u0);
    store(to + stride, u1);
    store(to + 2 * stride, u2);
    store(to + 3 * stride, u3);
    if (FIP) {
        const vi p1 = dot(zero(), u1, swap_fours(v1)), p2 = dot(zero(), u2, swap_fours(v2));
        left = dot(add(p1, p2), u0, swap_fours(v0));
        right = sub(sub(p1, p2), dot(zero(), u3, swap_fours(v3)));
    }
}

// 4 x 4 input patch of one vector of channels -> 16 positions. B^T d B, rows d0-d2, d1+d2, d2-d1, d1-d3. products: the four
// output pixels' sums of u1 * u2 in the lanes of the pairs' first halves (others hold other things), FIP only.
template <bool FIP>
BITDIAL_INLINE void transform_input(const uint8_t* from, int64_t pitch_y, int64_t pitch_x,
                                                                  const uint8_t* offsets, uint8_t* to, int64_t stride,
                                                                  vi centre, vi (&products)[4]) {
    vi x[4][4], d[4], left[4], right[4];
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) x[i][j] = load(from + i * pitch_y + j * pitch_x);
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) d[j] = sub_bytes(x[0][j], x[2][j]);
    transform_row<FIP>(d, offsets, to, stride, left[0], right[0], zero());
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) d[j] = add_bytes(x[1][j], x[2][j]);
    transform_row<FIP>(d, offsets + 4 * BYTES, to + 4 * stride, stride, left[1], right[1], centre);
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) d[j] = sub_bytes(x[2][j], x[1][j]);
    transform_row<FIP>(d, offsets + 8 * BYTES, to + 8 * stride, stride, left[2], right[2], zero());
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) d[j] = sub_bytes(x[1][j], x[3][j]);
    transform_row<FIP>(d, offsets + 12 * BYTES, to + 12 * stride, stride, left[3], right[3], zero());
    if (FIP) {
        products[0] = add(add(left[0], left[1]), left[2]);
        products[1] = add(add(right[0], right[1]), right[2]);
        products[2] = sub(sub(left[1], left[2]), left[3]);
        products[3] = sub(sub(right[1], right[2]), right[3]);
    }
}

// A^T m A of 16 positions: y[0], y[1] the upper pixels, y[2], y[3] the lower ones. Rows m0+m1+m2, m1-m2-m3.
BITDIAL_INLINE void transform_output(const vi (&m)[16], vi (&y)[4]) {
    vi t[2][4];
    _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {
        t[0][j] = add(add(m[j], m[4 + j]), m[8 + j]);
        t[1][j] = sub(sub(m[4 + j], m[8 + j]), m[12 + j]);
    }
    _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) {
        y[2 * i] = add(add(t[i][0], t[i][1]), t[i][2]);
        y[2 * i + 1] = sub(sub(t[i][1], t[i][2]), t[i][3]);
    }
}

struct WinogradLayout {
    int32_t tiles, tiles_y, tiles_x;
    int64_t row_bytes, position_bytes, sums_stride;  // of V; of M in int32
};

static inline WinogradLayout winograd_layout(const ConvArgs& c) {
    WinogradLayout w;
    w.tiles_y = ceil_div(c.out_h, 2);
    w.tiles_x = ceil_div(c.out_w, 2);
    w.tiles = c.batch * w.tiles_y * w.tiles_x;
    w.row_bytes = c.low_bytes;
    w.position_bytes = w.row_bytes * c.chunk + 64;  // + 64: positions must not fall on the same cache sets
    w.sums_stride = int64_t(BLOCK) * c.chunk + 16;
    return w;
}

// The output transform of one block, and what follows: the epilogue, or (FINISH false) rows of sums for the high part.
template <bool FINISH, EpilogueMode MODE>
static __attribute__((noinline)) void winograd_outputs(const ConvArgs& c, const WinogradLayout& layout, int32_t count, int32_t k,
                                                       const int32_t* m, const int32_t* index, const int32_t* row,
                                                       int final_shift, int32_t* sums, const Pixel* pixels) {
    const int32_t padded = ceil_div(c.outputs, BLOCK) * BLOCK;
    for (int32_t j = 0; j < BLOCK && k + j < c.outputs; j += COLS * LANES) {
        for (int32_t i = 0; i < count; i++) {
            vi y[4][COLS];
            _Pragma("GCC unroll 4") for (int v = 0; v < COLS; v++) {  // of narrow layers some hold nothing: not finished
                vi own[16], part[4];
                const int32_t* from = m + int64_t(i) * BLOCK + j + v * LANES;
                _Pragma("GCC unroll 16") for (int s = 0; s < 16; s++) own[s] = load(from + s * layout.sums_stride);
                transform_output(own, part);
                _Pragma("GCC unroll 4") for (int s = 0; s < 4; s++)
                    y[s][v] = add(shift_left(part[s], final_shift), load(c.correction + int64_t(s) * padded + k + j + v * LANES));
            }
            _Pragma("GCC unroll 4") for (int s = 0; s < 4; s++) {
                const int32_t p = index[4 * i + s];
                if (p < 0) continue;
                const vi own_products = row ? set(row[4 * i + s]) : zero();
                _Pragma("GCC unroll 4") for (int v = 0; v < COLS; v++) y[s][v] = shift_right_2(sub(y[s][v], own_products));
                if (FINISH) {
                    finish_row<COLS, MODE, false>(c.epilogue, y[s], k + j, c.outputs - k - j, pixels[p]);
                } else {
                    _Pragma("GCC unroll 4") for (int v = 0; v < COLS; v++)
                        store(sums + int64_t(p) * BLOCK + j + v * LANES, y[s][v]);
                }
            }
        }
    }
}

static void run_winograd(const ConvArgs& c, int32_t chunk, int32_t block0, int32_t block1, const Scratch& scratch,
                         Counters* counters) {
    const WinogradLayout layout = winograd_layout(c);
    const int32_t t0 = chunk * c.chunk, t1 = t0 + c.chunk < layout.tiles ? t0 + c.chunk : layout.tiles, count = t1 - t0;
    const bool fip = HAS_FIP && c.method == METHOD_WINOGRAD_FIP;
    uint8_t* memory = scratch.memory;
    Pixel* pixels = take<Pixel>(memory, 4 * count);  // [valid pixels], tile after tile
    const uint8_t** in = take<const uint8_t*>(memory, 4 * count);  // the same for the 8-bit input
    int32_t* index = take<int32_t>(memory, 4 * count);  // [tile][4] -> pixel, or -1
    int32_t* row = take<int32_t>(memory, 4 * count);  // [tile][4] products of the activations of their own
    if (!fip) row = nullptr;
    const uint8_t** v_rows = take<const uint8_t*>(memory, count + FIP_ROWS);
    int32_t* m = take<int32_t>(memory, 16 * layout.sums_stride);  // [position][tile][BLOCK]
    int32_t* sums = take<int32_t>(memory, c.high.count ? int64_t(4) * count * BLOCK : 0);  // [pixel][BLOCK] for a mixed layer
    uint8_t* v = take<uint8_t>(memory, 0);  // [position][tile][row_bytes]

    alignas(64) uint8_t offsets[16 * BYTES];
    for (int s = 0; s < 16; s++) store(offsets + s * BYTES, set_bytes(c.position_offset[s]));
    // where things lie, and the input transform
    int32_t valid = 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t t = t0 + i, n = t / (layout.tiles_y * layout.tiles_x);
        const int32_t y = t / layout.tiles_x % layout.tiles_y * 2, x = t % layout.tiles_x * 2;
        for (int32_t s = 0; s < 4; s++) {
            const int32_t yy = y + s / 2, xx = x + s % 2;
            const bool inside = yy < c.out_h && xx < c.out_w;
            index[4 * i + s] = inside ? valid : -1;
            if (!inside) continue;
            pixels[valid] = pixel_at(c, n, yy, xx);
            in[valid] = input_at(c, c.src, n, yy, xx);
            valid++;
        }
        const uint8_t* from = input_at(c, c.low, n, y, x);
        uint8_t* to = v + i * layout.row_bytes;
        vi total[4] = {zero(), zero(), zero(), zero()};
        for (int32_t b = 0, l = 0; b < c.low_bytes; b += BYTES, l += LANES) {
            if (!c.chunk_used[b / BYTES]) continue;
            vi products[4];
            if (!fip) {
                transform_input<false>(from + b, c.low.pitch_y, c.low.pitch_x, offsets, to + b, layout.position_bytes,
                                       set_bytes(c.centre), products);
                continue;
            }
            transform_input<true>(from + b, c.low.pitch_y, c.low.pitch_x, offsets, to + b, layout.position_bytes,
                                  set_bytes(c.centre), products);
            const vi mask = load(c.lane_mask + l), shift = load(c.lane_shift + l);
            _Pragma("GCC unroll 4") for (int s = 0; s < 4; s++)
                total[s] = add(total[s], shift_left_each(both(products[s], mask), shift));
        }
        if (fip) sum_four(total, row + 4 * i);
    }
    static const int32_t no_tap[1] = {0};
    const Tiling tiling(count, fip ? FIP_ROWS : ROWS);
    // The transform is linear: the last shift is made on its four results instead of sixteen inputs.
    GroupList low_groups = c.low_groups;
    const int final_shift = low_groups.final_shift;
    low_groups.final_shift = 0;
    const int64_t position_weights = c.low_block_bytes / 16, step = ahead_step(position_weights, tiling.tiles);
    for (int32_t b = block0; b < block1; b++) {
        const int32_t k = b * BLOCK;
        const int32_t outputs = c.outputs - k < BLOCK ? c.outputs - k : BLOCK;
        for (int32_t s = 0; s < 16; s++) {
            for (int32_t i = 0; i < count; i++) v_rows[i] = v + s * layout.position_bytes + i * layout.row_bytes;
            if (fip) {
                for (int32_t h = 0; h * FIP_BLOCK < outputs; h++) {
                    const int8_t* w = c.low_weights + (b * (BLOCK / FIP_BLOCK) + h) * c.low_block_bytes + s * position_weights;
                    const bool again = (h + 1) * FIP_BLOCK < outputs;  // else the next position, or the next block
                    const int8_t* next = again ? w + c.low_block_bytes
                                         : s < 15 ? w - h * c.low_block_bytes + position_weights
                                                  : c.low_weights + (b + 1) * (BLOCK / FIP_BLOCK) * c.low_block_bytes;
                    for (int32_t t = 0, i = 0, rows; t < tiling.tiles; t++, i += rows) {
                        rows = tiling.rows(t);
                        fip_rows(rows, c, low_groups, w, 1, no_tap, next + t * step, v_rows + i, nullptr,
                                 m + s * layout.sums_stride + int64_t(i) * BLOCK + h * FIP_BLOCK, BLOCK, 0, pixels);
                    }
                }
            } else {
                const int8_t* w = c.low_weights + b * c.low_block_bytes + s * position_weights;
                const int8_t* next = w + position_weights;
                for (int32_t t = 0, i = 0, rows; t < tiling.tiles; t++, i += rows) {
                    rows = tiling.rows(t);
                    dot_rows<true>(rows, outputs, c, low_groups, w, 1, no_tap, next + t * step, v_rows + i, nullptr,
                             m + s * layout.sums_stride + int64_t(i) * BLOCK, 0, pixels);
                }
            }
        }
        auto finish = [&](auto mode, auto last) {
            winograd_outputs<decltype(last)::value, EpilogueMode(decltype(mode)::value)>(c, layout, count, k, m, index, row,
                                                                                         final_shift, sums, pixels);
        };
        const EpilogueMode mode = c.epilogue.mode;
        if (c.high.count)
            finish(Count<EPILOGUE_ANY>(), Count<false>());
        else if (SATURATES && mode == EPILOGUE_SATURATED)
            finish(Count<SATURATES ? EPILOGUE_SATURATED : EPILOGUE_ANY>(), Count<true>());
        else if (mode == EPILOGUE_LIMITED || mode == EPILOGUE_SIGNED)
            finish(Count<EPILOGUE_LIMITED>(), Count<true>());
        else if (mode == EPILOGUE_RESIDUAL)
            finish(Count<EPILOGUE_RESIDUAL>(), Count<true>());
        else
            finish(Count<EPILOGUE_ANY>(), Count<true>());
        counters->low += int64_t(valid) * outputs * c.low_groups.channels * 9;
        counters->multiplications += int64_t(count) * 16 * outputs * c.low_groups.channels / (fip ? 2 : 1);
        if (c.high.count) {
            high_tiles(valid, outputs, c, b, in, sums, pixels);
            count_dot(c, valid, outputs, counters);
        }
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
