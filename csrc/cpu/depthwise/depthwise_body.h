// Depthwise convolution; see depthwise.h.
#pragma once
#include "../simd/simd.h"
#include "../elementwise/rows.h"
#include "depthwise.h"

namespace bitdial {
namespace BITDIAL_ISA {

static constexpr int32_t kMaxTaps = 128;

// One block of channels: packed weights, corrected bias, and the block that stands for pixels outside the image.
struct DepthwiseBlock {
    Taps weights[kMaxTaps / kTapGroup];
    int32_t bias[BYTES];
    uint8_t outside[BYTES];
    int32_t channel, count, taps, groups;
};

static inline void prepare_block(DepthwiseBlock& block, const DepthwiseArgs& a, int32_t channel) {
    const int32_t channels = a.dst.c;
    block.channel = channel;
    block.count = smaller(BYTES, channels - channel);
    block.taps = a.kernel_h * a.kernel_w;
    block.groups = (block.taps + kTapGroup - 1) / kTapGroup;
    for (int32_t g = 0; g < block.groups; ++g) {
        vi tap[kTapGroup];
        for (int32_t t = 0; t < kTapGroup; ++t) {
            const int32_t index = g * kTapGroup + t;
            const int8_t* row = a.weight + static_cast<int64_t>(index) * channels + channel;
            tap[t] = index < block.taps ? load(reinterpret_cast<const uint8_t*>(row), block.count) : zero();
        }
        block.weights[g] = pack_weights(tap);
    }
    for (int32_t i = 0; i < BYTES; ++i) block.outside[i] = static_cast<uint8_t>(a.zero_src);
    for (int32_t i = 0; i < block.count; ++i) {
        int32_t sum = 0;
        for (int32_t t = 0; t < block.taps; ++t) sum += a.weight[static_cast<int64_t>(t) * channels + channel + i];
        block.bias[i] = static_cast<int32_t>(static_cast<uint32_t>(a.bias[channel + i]) -
                                             static_cast<uint32_t>(a.zero_src) * static_cast<uint32_t>(sum));
    }
}

// Where the taps of a pixel lie, and how far each moves to the next pixel (taps above or below the image stand still).
struct TapPointers {
    const uint8_t* from[kMaxTaps + kTapGroup];
    int64_t step[kMaxTaps + kTapGroup];
};

static inline void point_taps(TapPointers& p, const DepthwiseBlock& block, const DepthwiseArgs& a, int32_t n, int32_t y,
                              int32_t x) {
    int32_t t = 0;
    for (int32_t i = 0; i < a.kernel_h; ++i) {
        const int32_t row = y * a.stride_h - a.pad_h + i * a.dilation_h;
        for (int32_t j = 0; j < a.kernel_w; ++j, ++t) {
            const int32_t column = x * a.stride_w - a.pad_w + j * a.dilation_w;
            const bool in = row >= 0 && row < a.src.h && column >= 0 && column < a.src.w;
            p.from[t] = in ? at(a.src, n, row, column) + block.channel : block.outside;
            p.step[t] = in ? a.stride_w * a.src.pitch_x : 0;
        }
    }
    for (; t < block.groups * kTapGroup; ++t) {
        p.from[t] = block.outside;
        p.step[t] = 0;
    }
}

// acc + bias of one pixel. `moves` is how many pixels the pointers are behind. Groups > 0: known at compile time.
template <bool Full, int32_t Groups>
BITDIAL_INLINE Ints depthwise_sums(const DepthwiseBlock& block, const TapPointers& p, int64_t moves) {
    Ints sums = fill(int32_t{0});
    for (int32_t g = 0; g < (Groups > 0 ? Groups : block.groups); ++g) {
        vi tap[kTapGroup];
        for (int32_t t = 0; t < kTapGroup; ++t) {
            const int32_t index = g * kTapGroup + t;
            tap[t] = load<Full>(p.from[index] + moves * p.step[index], block.count);
        }
        multiply_taps(sums, tap, block.weights[g]);
    }
    return add(in_order(sums), load_block<Ints>(block.bias, Full ? BYTES : block.count));
}

template <bool Full>
BITDIAL_INLINE void finish_pixel(const DepthwiseArgs& a, const Ints& sums, int32_t n, int32_t y, int32_t x,
                                int32_t channel, int32_t partial) {
    const int32_t count = Full ? BYTES : partial;
    if (a.dst_acc != nullptr) {
        const int64_t pixel = (static_cast<int64_t>(n) * a.dst.h + y) * a.dst.w + x;
        store(a.dst_acc + pixel * a.dst.c + channel, sums, count);
        return;
    }
    const float* factors = a.m + channel;
    Floats t = mul(to_float(sums), load_floats<Full>(factors, count));
    if (a.residual != nullptr) {
        const ConstByteView& view = a.residual_view;
        const int64_t offset = n * view.pitch_n + y * view.pitch_y + x * view.pitch_x + channel;
        const vi r = load<Full>(a.residual + offset, count);
        t = add(t, mul(values(r, a.zero_residual), fill(a.residual_factor)));
    }
    const vi q = narrow(clamp(t, fill(a.lo), fill(a.hi)), set_bytes(static_cast<uint8_t>(a.zero_dst)));
    store<Full>(at(a.dst, n, y, x) + channel, q, count);
}

template <bool Full, int32_t Groups>
static inline void depthwise_row(const DepthwiseBlock& block, const DepthwiseArgs& a, TapPointers& p, int32_t n,
                                 int32_t y) {
    int32_t begin = 0, end = 0;  // pixels whose columns all lie inside
    while (begin < a.dst.w && begin * a.stride_w < a.pad_w) ++begin;
    const int32_t reach = (a.kernel_w - 1) * a.dilation_w - a.pad_w;
    for (end = begin; end < a.dst.w && end * a.stride_w + reach < a.src.w;) ++end;
    for (int32_t x = 0; x < a.dst.w; ++x) {
        if (x <= begin || x >= end) point_taps(p, block, a, n, y, x);
        const int64_t moves = x > begin && x < end ? x - begin : 0;
        finish_pixel<Full>(a, depthwise_sums<Full, Groups>(block, p, moves), n, y, x, block.channel, block.count);
    }
}

template <bool Full>
static inline void depthwise_rows(const DepthwiseBlock& block, const DepthwiseArgs& a, int32_t row0, int32_t row1) {
    static constexpr int32_t kNine = (9 + kTapGroup - 1) / kTapGroup;  // groups of a 3 x 3 window
    TapPointers p;
    for_each_span(row0, row1, a.dst.h, false, [&](int32_t n, int32_t y, int32_t) {
        if (block.groups == kNine) {
            depthwise_row<Full, kNine>(block, a, p, n, y);
        } else {
            depthwise_row<Full, 0>(block, a, p, n, y);
        }
    });
}

// Any multiplicity and window, one output at a time.
static inline int32_t plain_sum(const DepthwiseArgs& a, int32_t n, int32_t y, int32_t x, int32_t o) {
    uint32_t sum = static_cast<uint32_t>(a.bias[o]);  // wraps where the int32 sums elsewhere would
    for (int32_t i = 0; i < a.kernel_h; ++i) {
        const int32_t row = y * a.stride_h - a.pad_h + i * a.dilation_h;
        for (int32_t j = 0; j < a.kernel_w; ++j) {
            const int32_t column = x * a.stride_w - a.pad_w + j * a.dilation_w;
            if (row < 0 || row >= a.src.h || column < 0 || column >= a.src.w) continue;
            const int32_t value = at(a.src, n, row, column)[o / a.multiplicity] - a.zero_src;
            sum += static_cast<uint32_t>(value * a.weight[static_cast<int64_t>(i * a.kernel_w + j) * a.dst.c + o]);
        }
    }
    return static_cast<int32_t>(sum);
}

static inline void plain_row(const DepthwiseArgs& a, int32_t n, int32_t y) {
    int32_t sums[BYTES];
    for (int32_t x = 0; x < a.dst.w; ++x) {
        for (int32_t o = 0; o < a.dst.c; o += BYTES) {
            const int32_t count = smaller(BYTES, a.dst.c - o);
            for (int32_t i = 0; i < count; ++i) sums[i] = plain_sum(a, n, y, x, o + i);
            finish_pixel<false>(a, load_block<Ints>(sums, count), n, y, x, o, count);
        }
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial

#if BITDIAL_TAP_COLUMNS
#include "columns_body.h"
#endif

namespace bitdial {
namespace BITDIAL_ISA {

void depthwise(const DepthwiseArgs& a, int32_t row0, int32_t row1) {
#if BITDIAL_TAP_COLUMNS
    if (a.multiplicity == 1 && takes_columns(a)) {
        if (a.kernel_h == 3)
            return a.stride_h == 1 ? by_columns<3, 1>(a, row0, row1) : by_columns<3, 2>(a, row0, row1);
        return a.stride_h == 1 ? by_columns<5, 1>(a, row0, row1) : by_columns<5, 2>(a, row0, row1);
    }
#endif
    if (a.multiplicity != 1 || a.kernel_h * a.kernel_w > kMaxTaps) {
        for_each_span(row0, row1, a.dst.h, false, [&](int32_t n, int32_t y, int32_t) { plain_row(a, n, y); });
        return;
    }
    DepthwiseBlock block;
    for (int32_t channel = 0; channel < a.dst.c; channel += BYTES) {
        prepare_block(block, a, channel);
        if (block.count == BYTES) {
            depthwise_rows<true>(block, a, row0, row1);
        } else {
            depthwise_rows<false>(block, a, row0, row1);
        }
    }
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
