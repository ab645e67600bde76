// Depthwise convolution by columns: windows of 3 x 3 and 5 x 5 without dilation, where the padding lies in memory around the
// image. Included by depthwise_body.h.
//
// The rows of a window at one column are interleaved once and used by all windows of a few adjacent outputs that hold the
// column. Sums stay in the order of the interleaving: bias and factors are brought into it, and packing to bytes takes it back.
#pragma once

namespace bitdial {
namespace BITDIAL_ISA {

struct ColumnBlock {
    Taps weights[(5 + kTapGroup - 1) / kTapGroup][5];  // [group of rows][column]
    Ints bias;           // interleaved
    Floats m;
    bool bytes;  // the outputs are what packing makes of sums times factors
};

static inline bool takes_columns(const DepthwiseArgs& a) {
    const int32_t k = a.kernel_h, s = a.stride_h;
    const bool window = (k == 3 || k == 5) && a.kernel_w == k && (s == 1 || s == 2) && a.stride_w == s && a.dilation_h == 1 &&
                        a.dilation_w == 1;
    return window && a.pad_h <= a.margin_h && a.pad_w <= a.margin_w &&
           (a.dst.h - 1) * s + k - a.pad_h - a.src.h <= a.margin_h && (a.dst.w - 1) * s + k - a.pad_w - a.src.w <= a.margin_w;
}

template <int32_t K>
static inline void prepare_columns(ColumnBlock& block, const DepthwiseArgs& a, int32_t channel, int32_t count) {
    Ints sums = fill(int32_t{0});
    vi one[kTapGroup];
    for (vi& row : one) row = set_bytes(1);
    const Taps ones = interleave_taps(one);
    for (int32_t j = 0; j < K; ++j) {
        for (int32_t g = 0; g < (K + kTapGroup - 1) / kTapGroup; ++g) {
            vi row[kTapGroup];
            for (int32_t i = 0; i < kTapGroup; ++i) {
                const int64_t tap = (kTapGroup * g + i) * K + j;
                row[i] = zero();
                if (kTapGroup * g + i < K)
                    row[i] = load(reinterpret_cast<const uint8_t*>(a.weight) + tap * a.dst.c + channel, count);
            }
            block.weights[g][j] = pack_weights(row);
            dot_taps(sums, ones, block.weights[g][j]);
        }
    }
    int32_t total[BYTES], bias[BYTES];
    store(total, in_order(sums), BYTES);
    block.bytes = a.dst_acc == nullptr && a.residual == nullptr && a.zero_dst == 0 && a.lo == 0.0f && a.hi == 255.0f;
    for (int32_t i = 0; i < BYTES; ++i) {
        bias[i] = i < count ? static_cast<int32_t>(static_cast<uint32_t>(a.bias[channel + i]) -
                                                   static_cast<uint32_t>(a.zero_src) * static_cast<uint32_t>(total[i]))
                            : 0;
        // Beyond this rounding to int32 could leave its range.
        const float most = 32640.0f * K * K + (bias[i] < 0 ? -static_cast<float>(bias[i]) : static_cast<float>(bias[i]));
        if (i < count && !(most * a.m[channel + i] < 1073741824.0f && most * a.m[channel + i] > -1073741824.0f))
            block.bytes = false;
    }
    block.bias = interleaved(load_block<Ints>(bias, BYTES));
    block.m = interleaved(load_block<Floats>(a.m + channel, count));
}

// T adjacent outputs, the first at column x; `from` is the first row and column of its window. BYTES: block.bytes.
template <int32_t K, int32_t S, int32_t T, bool BYTES, bool Full>
BITDIAL_INLINE void column_tile(const ColumnBlock& block, const DepthwiseArgs& a, const uint8_t* from,
                                                     int64_t pitch_x, int64_t pitch_y, int32_t n, int32_t y, int32_t x,
                                                     int32_t channel, int32_t count) {
    Ints sums[T];
    _Pragma("GCC unroll 4") for (int32_t t = 0; t < T; ++t) sums[t] = block.bias;
    _Pragma("GCC unroll 16") for (int32_t p = 0; p < (T - 1) * S + K; ++p) {
        _Pragma("GCC unroll 3") for (int32_t g = 0; g < (K + kTapGroup - 1) / kTapGroup; ++g) {
            vi row[kTapGroup];
            _Pragma("GCC unroll 4") for (int32_t i = 0; i < kTapGroup; ++i) {
                const int32_t r = kTapGroup * g + i;
                row[i] = r < K ? load<Full>(from + p * pitch_x + r * pitch_y, count) : zero();
            }
            const Taps taps = interleave_taps(row);
            _Pragma("GCC unroll 4") for (int32_t t = 0; t < T; ++t) {
                if (p >= t * S && p < t * S + K) dot_taps(sums[t], taps, block.weights[g][p - t * S]);
            }
        }
    }
    if (BYTES) {
        uint8_t* to = at(a.dst, n, y, x) + channel;
        const int64_t step = a.dst.pitch_x;
        vi q[T];
        _Pragma("GCC unroll 4") for (int32_t t = 0; t < T; ++t) q[t] = pack_taps(mul(to_float(sums[t]), block.m));
        _Pragma("GCC unroll 4") for (int32_t t = 0; t < T; ++t) store<Full>(to + t * step, q[t], count);
    } else {
        for (int32_t t = 0; t < T; ++t) finish_pixel<Full>(a, in_order(sums[t]), n, y, x + t, channel, count);
    }
}

template <int32_t K, int32_t S, bool BYTES, bool Full>
static inline void column_rows(const ColumnBlock& block, const DepthwiseArgs& a, int32_t row0, int32_t row1, int32_t channel,
                               int32_t count) {
    const int64_t pitch_x = a.src.pitch_x, pitch_y = a.src.pitch_y, step = S * pitch_x;
    const int32_t width = a.dst.w;
    for_each_span(row0, row1, a.dst.h, false, [&](int32_t n, int32_t y, int32_t) {
        const uint8_t* from = at(a.src, n, y * S - a.pad_h, -a.pad_w) + channel;
        for (int32_t x = 0; x < width;) {
            if (x + kColumnTile <= width || (BYTES && width >= kColumnTile)) {
                if (x + kColumnTile > width) x = width - kColumnTile;  // some outputs a second time
                column_tile<K, S, kColumnTile, BYTES, Full>(block, a, from + x * step, pitch_x, pitch_y, n, y, x, channel, count);
                x += kColumnTile;
            } else {
                column_tile<K, S, 1, BYTES, Full>(block, a, from + x * step, pitch_x, pitch_y, n, y, x, channel, count);
                ++x;
            }
        }
    });
}

template <int32_t K, int32_t S>
static inline void by_columns(const DepthwiseArgs& a, int32_t row0, int32_t row1) {
    ColumnBlock block;
    for (int32_t next = 0; next < a.dst.c; next += BYTES) {
        // The last block is a whole one where it can be, some channels a second time (not over a residual that they replace).
        const int32_t channel = a.dst.c >= BYTES && a.residual == nullptr ? smaller(next, a.dst.c - BYTES) : next;
        const int32_t count = smaller(BYTES, a.dst.c - channel);
        prepare_columns<K>(block, a, channel, count);
        if (block.bytes)
            count == BYTES ? column_rows<K, S, true, true>(block, a, row0, row1, channel, count)
                            : column_rows<K, S, true, false>(block, a, row0, row1, channel, count);
        else
            column_rows<K, S, false, false>(block, a, row0, row1, channel, count);
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
