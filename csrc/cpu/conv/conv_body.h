// The convolution kernels of conv_args.h, generic over an instruction set.
#pragma once
#include "pixels_body.h"
#include "winograd_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

Facts facts() {
    return {BLOCK, FIP_BLOCK, BYTES, ROWS, HAS_FIP, NARROW, BITDIAL_SPLIT, SATURATES, BITDIAL_EXTRACT_BYTES};
}

static bool is_winograd(const ConvArgs& c) {
    return c.low_groups.count && (c.method == METHOD_WINOGRAD || c.method == METHOD_WINOGRAD_FIP);
}
int64_t conv_scratch(const ConvArgs& c) {
    if (!is_winograd(c)) return (sizeof(Pixel) + 8 + 8 + 4 + 4 * int64_t(BLOCK) + extracted_row(c)) * c.chunk + 64 * 12 +
               (c.derive ? c.low_block_bytes : 0);
    const WinogradLayout w = winograd_layout(c);
    return (sizeof(Pixel) + 8 + 4 + 4 + 8) * 4 * int64_t(c.chunk) + 64 * 16 + 4 * 16 * w.sums_stride +
           int64_t(4) * 4 * c.chunk * BLOCK + 16 * w.position_bytes;
}
int32_t conv_units(const ConvArgs& c) {
    return is_winograd(c) ? winograd_layout(c).tiles : c.batch * c.out_h * c.out_w;
}
int32_t conv_chunks(const ConvArgs& c) { return ceil_div(conv_units(c), c.chunk); }
void conv(const ConvArgs& c, int32_t chunk, int32_t block0, int32_t block1, const Scratch& s, Counters* counters) {
    if (is_winograd(c))
        run_winograd(c, chunk, block0, block1, s, counters);
    else
        run_pixels(c, chunk, block0, block1, s, counters);
}

int64_t burn(int64_t rounds, int32_t* sink) {
    // The direct kernel's register tile over operands that stay in the first cache (and whose pairs fit 16 bits).
    enum { UNITS = 64 };
    alignas(64) uint8_t x[ROWS][4 * UNITS];
    alignas(64) int8_t w[UNITS * 4 * LANES * COLS];
    const uint8_t* in[ROWS];
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < 4 * UNITS; j++) x[i][j] = static_cast<uint8_t>(i + j);
        in[i] = x[i];
    }
    for (int i = 0; i < UNITS * 4 * LANES * COLS; i++) w[i] = static_cast<int8_t>(i % 7);
    ConvArgs nothing{};
    alignas(64) int32_t sums[ROWS * BLOCK];
    // Through volatile copies, so that the compiler makes no variant of the tile for these very arguments.
    int32_t* volatile into = sums;
    const int32_t* volatile init = nullptr;
    const Pixel* volatile pixels = nullptr;
#if BITDIAL_SPLIT
    int32_t places[UNITS];
    for (int i = 0; i < UNITS; i++) places[i] = 4 * i;
    const SplitRun run = {0, 0, UNITS, 0};
    nothing.high_weights = w;
    nothing.split_places = places;
    nothing.split_runs = 1;
    for (int64_t r = 0; r < rounds; r++) split_tile<ROWS, COLS>(nothing, &run, in, init, into, 0, pixels);
#else
    const Group group = {0, 0, UNITS, 0, 4 * UNITS};
    const GroupList list = {&group, 1, 0, 4 * UNITS};
    const int32_t tap[1] = {0};
    volatile int32_t taps = 1;
    for (int64_t r = 0; r < rounds; r++)
        dot_tile<ROWS, false, COLS>(nothing, list, w, taps, tap, nullptr, in, init, into, 0, pixels);
#endif
    *sink = sums[0];
    return rounds * ROWS * COLS * LANES * 4 * UNITS;
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
