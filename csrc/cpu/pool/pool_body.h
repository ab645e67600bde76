// Maximum and sum over windows; see pool.h.
#pragma once
#include "../simd/simd.h"
#include "../elementwise/rows.h"
#include "pool.h"

namespace bitdial {
namespace BITDIAL_ISA {

// Taps of one axis that lie inside: first, first + 1, ..., first + count - 1.
struct Inside {
    int32_t first, count;
};
static inline Inside taps_inside(int32_t start, int32_t kernel, int32_t dilation, int32_t size) {
    const int32_t first = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
    const int32_t end = start >= size ? 0 : smaller(kernel, (size - start + dilation - 1) / dilation);
    return {first, larger(0, end - first)};
}

// Rows x columns of taps, each `step` apart, for `count` channels (at most BYTES). Sizes above 0 are known at compile
// time; otherwise they are read.
template <bool Full, int32_t Rows, int32_t Columns>
BITDIAL_INLINE vi window_maximum(const uint8_t* from, int64_t step_y, int64_t step_x, int32_t rows, int32_t columns,
                                   int32_t count) {
    vi best = zero();
    for (int32_t i = 0; i < (Rows > 0 ? Rows : rows); ++i) {
        const uint8_t* tap = from + i * step_y;
        for (int32_t j = 0; j < (Columns > 0 ? Columns : columns); ++j) {
            best = larger_bytes(best, load<Full>(tap + j * step_x, count));
        }
    }
    return best;
}

template <int32_t Rows, int32_t Columns>
static inline void pixel_maximum(const uint8_t* from, int64_t step_y, int64_t step_x, int32_t rows, int32_t columns,
                                 uint8_t* to, int32_t channels) {
    int32_t c = 0;
    for (; c + BYTES <= channels; c += BYTES) {
        store(to + c, window_maximum<true, Rows, Columns>(from + c, step_y, step_x, rows, columns, BYTES));
    }
    if (c < channels) {
        const int32_t rest = channels - c;
        store(to + c, window_maximum<false, Rows, Columns>(from + c, step_y, step_x, rows, columns, rest), rest);
    }
}

// The pixels [x0, x1) of a row, whose windows have all their columns inside.
template <int32_t Rows, int32_t Columns>
static inline void row_maximum(const MaxPoolArgs& a, const uint8_t* row, int64_t step_y, int32_t rows, int32_t x0,
                               int32_t x1, uint8_t* to) {
    const int64_t step_x = a.dilation_w * a.src.pitch_x, advance = a.stride_w * a.src.pitch_x, pitch = a.dst.pitch_x;
    const int32_t columns = a.kernel_w, channels = a.dst.c;
    const uint8_t* from = row + (x0 * a.stride_w - a.pad_w) * a.src.pitch_x;
    for (int32_t x = x0; x < x1; ++x, from += advance) {
        pixel_maximum<Rows, Columns>(from, step_y, step_x, rows, columns, to + x * pitch, channels);
    }
}

// First pixel whose window starts inside, and one past the last whose window ends inside; both at most `out`, and the
// second no less than the first.
struct Interior {
    int32_t begin, end;
};
static inline Interior interior(int32_t out, int32_t kernel, int32_t stride, int32_t pad, int32_t dilation, int32_t size) {
    const int32_t begin = smaller(out, (pad + stride - 1) / stride);
    const int32_t room = size - 1 - (kernel - 1) * dilation + pad;  // the largest start that fits
    const int32_t end = room < 0 ? 0 : smaller(out, room / stride + 1);
    return {begin, larger(begin, end)};
}

void max_pool(const MaxPoolArgs& a, int32_t row0, int32_t row1) {
    const Interior middle = interior(a.dst.w, a.kernel_w, a.stride_w, a.pad_w, a.dilation_w, a.src.w);
    const int64_t step_y = a.dilation_h * a.src.pitch_y, step_x = a.dilation_w * a.src.pitch_x;
    for_each_span(row0, row1, a.dst.h, false, [&](int32_t n, int32_t y, int32_t) {
        const int32_t top = y * a.stride_h - a.pad_h;
        const Inside rows = taps_inside(top, a.kernel_h, a.dilation_h, a.src.h);
        const uint8_t* row = at(a.src, n, top + rows.first * a.dilation_h, 0);
        uint8_t* to = at(a.dst, n, y, 0);
        for (int32_t x = 0; x < a.dst.w; ++x) {
            if (x == middle.begin && x < middle.end) {
                if (rows.count == 3 && a.kernel_w == 3) {
                    row_maximum<3, 3>(a, row, step_y, 3, x, middle.end, to);
                } else if (rows.count == 2 && a.kernel_w == 2) {
                    row_maximum<2, 2>(a, row, step_y, 2, x, middle.end, to);
                } else {
                    row_maximum<0, 0>(a, row, step_y, rows.count, x, middle.end, to);
                }
                x = middle.end - 1;
                continue;
            }
            const int32_t left = x * a.stride_w - a.pad_w;
            const Inside columns = taps_inside(left, a.kernel_w, a.dilation_w, a.src.w);
            const uint8_t* from = row + (left + columns.first * a.dilation_w) * a.src.pitch_x;
            pixel_maximum<0, 0>(from, step_y, step_x, rows.count, columns.count, to + x * a.dst.pitch_x, a.dst.c);
        }
    });
}

// Sums of stored bytes over rows x columns of taps.
template <bool Full>
BITDIAL_INLINE Ints window_sum(const uint8_t* from, int64_t step_y, int64_t step_x, int32_t rows, int32_t columns,
                              int32_t count) {
    Ints sums = fill(int32_t{0});
    Words words = zero_words();
    int32_t room = 256;
    for (int32_t i = 0; i < rows; ++i) {
        const uint8_t* tap = from + i * step_y;
        for (int32_t j = 0; j < columns;) {
            const int32_t batch = smaller(room, columns - j);
            for (int32_t k = 0; k < batch; ++k, tap += step_x) accumulate(words, load<Full>(tap, count));
            j += batch;
            room -= batch;
            if (room == 0) {
                gather_words(sums, words);
                words = zero_words();
                room = 256;
            }
        }
    }
    gather_words(sums, words);
    return sums;
}

void sum_pool(const SumPoolArgs& a, int32_t row0, int32_t row1) {
    const float factor = a.factor, lo = a.lo, hi = a.hi;
    const uint8_t zero = static_cast<uint8_t>(a.zero_dst);
    const int64_t step_y = a.src.pitch_y, step_x = a.src.pitch_x;
    for_each_span(row0, row1, a.dst.h, false, [&](int32_t n, int32_t y, int32_t) {
        const int32_t top = y * a.stride_h - a.pad_h;
        const Inside rows = taps_inside(top, a.kernel_h, 1, a.src.h);
        for (int32_t x = 0; x < a.dst.w; ++x) {
            const int32_t left = x * a.stride_w - a.pad_w;
            const Inside columns = taps_inside(left, a.kernel_w, 1, a.src.w);
            const uint8_t* from = at(a.src, n, top + rows.first, left + columns.first);
            uint8_t* to = at(a.dst, n, y, x);
            const Ints offset = fill(-a.zero_src * rows.count * columns.count);
            for (int32_t c = 0; c < a.dst.c; c += BYTES) {
                const int32_t count = smaller(BYTES, a.dst.c - c);
                const Ints sums = count == BYTES
                                      ? window_sum<true>(from + c, step_y, step_x, rows.count, columns.count, count)
                                      : window_sum<false>(from + c, step_y, step_x, rows.count, columns.count, count);
                const Floats t = mul(to_float(add(sums, offset)), fill(factor));
                store(to + c, narrow(clamp(t, fill(lo), fill(hi)), set_bytes(zero)), count);
            }
        }
    });
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
