// float -> bytes and back; see elementwise.h.
#pragma once
#include "../copy/transpose.h"
#include "../simd/simd.h"
#include "elementwise.h"
#include "rows.h"

namespace bitdial {
namespace BITDIAL_ISA {

// float -> bytes with the constants at hand. Loops work on a copy, which lives in registers: stores of bytes may alias
// anything in memory.
struct Quantizer {
    float inverse, lo, hi;
    uint8_t zero;
    Watch seen;

    template <bool Full>
    inline BITDIAL_ALWAYS_INLINE vi block(const float* from, int32_t count) {
        const Floats x = load_floats<Full>(from, count);
        watch(seen, x);
        return narrow(clamp(mul(x, fill(inverse)), fill(lo), fill(hi)), set_bytes(zero));
    }
};

static inline void quantize_run(Quantizer& shared, const float* from, uint8_t* to, int64_t length) {
    Quantizer q = shared;
    int64_t i = 0;
    for (; i + BYTES <= length; i += BYTES) store(to + i, q.block<true>(from + i, BYTES));
    const int32_t rest = static_cast<int32_t>(length - i);
    if (rest > 0) store(to + i, q.block<false>(from + i, rest), rest);
    shared = q;
}

// Three planes `plane` floats apart -> `pixels` adjacent pixels of three bytes.
static inline void quantize_three_planes(Quantizer& shared, const float* from, int64_t plane, uint8_t* to,
                                         int64_t pixels) {
    Quantizer q = shared;
    int64_t i = 0;
    for (; i + BYTES <= pixels; i += BYTES) {
        const vi r = q.block<true>(from + i, BYTES), g = q.block<true>(from + plane + i, BYTES);
        store_interleaved3(to + 3 * i, r, g, q.block<true>(from + 2 * plane + i, BYTES));
    }
    const int32_t rest = static_cast<int32_t>(pixels - i);
    if (rest > 0) {
        uint8_t stage[3 * BYTES];
        const vi r = q.block<false>(from + i, rest), g = q.block<false>(from + plane + i, rest);
        store_interleaved3(stage, r, g, q.block<false>(from + 2 * plane + i, rest));
        __builtin_memcpy(to + 3 * i, stage, static_cast<uint64_t>(3 * rest));
    }
    shared = q;
}

// `channels` planes -> pixels `pitch` bytes apart.
static inline void quantize_planes(Quantizer& shared, const float* from, int64_t plane, uint8_t* to, int64_t pitch,
                                   int64_t pixels, int32_t channels) {
    Quantizer q = shared;
    uint8_t tile[16 * BYTES];
    for (int64_t i = 0; i < pixels; i += BYTES) {
        const int32_t width = pixels - i < BYTES ? static_cast<int32_t>(pixels - i) : BYTES;
        for (int32_t c0 = 0; c0 < channels; c0 += 16) {
            const int32_t depth = smaller(16, channels - c0);
            for (int32_t c = 0; c < depth; ++c) {
                const float* row = from + (c0 + c) * plane + i;
                store(tile + c * BYTES, width == BYTES ? q.block<true>(row, width) : q.block<false>(row, width));
            }
            transpose(tile, BYTES, depth, width, to + i * pitch + c0, pitch);
        }
    }
    shared = q;
}

// Slow, and run only where a NaN or infinity was met.
static inline int64_t count_nonfinite(const QuantizeArgs& a, int32_t row0, int32_t row1) {
    int64_t found = 0;
    for (int32_t row = row0; row < row1; ++row) {
        const float* from = a.src + row / a.dst.h * a.src_n + row % a.dst.h * a.src_y;
        for (int32_t x = 0; x < a.dst.w; ++x) {
            for (int32_t c = 0; c < a.dst.c; ++c) {
                uint32_t bits;
                __builtin_memcpy(&bits, from + x * a.src_x + c * a.src_c, 4);
                found += (bits & 0x7f800000u) == 0x7f800000u;
            }
        }
    }
    return found;
}

int64_t quantize(const QuantizeArgs& a, int32_t row0, int32_t row1) {
    const int32_t h = a.dst.h, w = a.dst.w, c = a.dst.c;
    const int64_t step = pixel_pitch(h, w, c, a.src_x, a.src_y), pitch = pixel_pitch(h, w, c, a.dst.pitch_x, a.dst.pitch_y);
    const bool whole = rows_adjoin(h, w, a.src_x, a.src_y) && rows_adjoin(h, w, a.dst.pitch_x, a.dst.pitch_y);
    const bool adjacent = a.src_c == 1 || c == 1;
    const bool dense = adjacent && step == c && pitch == c;
    Quantizer q = {a.inverse, a.lo, a.hi, static_cast<uint8_t>(a.zero), start_watch()};
    for_each_span(row0, row1, h, whole, [&](int32_t n, int32_t y, int32_t rows) {
        const float* from = a.src + n * a.src_n + y * a.src_y;
        uint8_t* to = at(a.dst, n, y, 0);
        const int64_t pixels = static_cast<int64_t>(rows) * w;
        if (dense) {
            quantize_run(q, from, to, pixels * c);
        } else if (step == 1 && c == 3 && pitch == 3) {
            quantize_three_planes(q, from, a.src_c, to, pixels);
        } else if (step == 1) {
            quantize_planes(q, from, a.src_c, to, pitch, pixels, c);
        } else {
            for (int64_t i = 0; i < pixels; ++i) {
                for (int32_t j = 0; j < (adjacent ? 1 : c); ++j) {
                    quantize_run(q, from + i * step + j * a.src_c, to + i * pitch + j, adjacent ? c : 1);
                }
            }
        }
    });
    return any_nonfinite(q.seen) ? count_nonfinite(a, row0, row1) : 0;
}

// vi -> adjacent floats.
static inline void dequantize_run(const uint8_t* from, float* to, int64_t length, int32_t zero, float scale) {
    const Floats factor = fill(scale);
    int64_t i = 0;
    for (; i + BYTES <= length; i += BYTES) store(to + i, mul(values(load(from + i), zero), factor));
    const int32_t rest = static_cast<int32_t>(length - i);
    if (rest > 0) store(to + i, mul(values(load(from + i, rest), zero), factor), rest);
}

// Pixels `pitch` bytes apart -> `channels` planes.
static inline void dequantize_planes(const uint8_t* from, int64_t pitch, float* to, int64_t plane, int64_t pixels,
                                     int32_t channels, int32_t zero, float scale) {
    uint8_t tile[16 * BYTES];
    for (int64_t i = 0; i < pixels; i += BYTES) {
        const int32_t width = pixels - i < BYTES ? static_cast<int32_t>(pixels - i) : BYTES;
        for (int32_t c0 = 0; c0 < channels; c0 += 16) {
            const int32_t depth = smaller(16, channels - c0);
            transpose(from + i * pitch + c0, pitch, width, depth, tile, BYTES);
            for (int32_t c = 0; c < depth; ++c) {
                dequantize_run(tile + c * BYTES, to + (c0 + c) * plane + i, width, zero, scale);
            }
        }
    }
}

void dequantize(const DequantizeArgs& a, int32_t row0, int32_t row1) {
    const int32_t h = a.src.h, w = a.src.w, c = a.src.c;
    const int64_t step = pixel_pitch(h, w, c, a.dst_x, a.dst_y), pitch = pixel_pitch(h, w, c, a.src.pitch_x, a.src.pitch_y);
    const bool whole = rows_adjoin(h, w, a.dst_x, a.dst_y) && rows_adjoin(h, w, a.src.pitch_x, a.src.pitch_y);
    const bool adjacent = a.dst_c == 1 || c == 1;
    const bool dense = adjacent && step == c && pitch == c;
    for_each_span(row0, row1, h, whole, [&](int32_t n, int32_t y, int32_t rows) {
        const uint8_t* from = at(a.src, n, y, 0);
        float* to = a.dst + n * a.dst_n + y * a.dst_y;
        const int64_t pixels = static_cast<int64_t>(rows) * w;
        if (dense) {
            dequantize_run(from, to, pixels * c, a.zero, a.scale);
        } else if (step == 1) {
            dequantize_planes(from, pitch, to, a.dst_c, pixels, c, a.zero, a.scale);
        } else {
            for (int64_t i = 0; i < pixels; ++i) {
                for (int32_t j = 0; j < (adjacent ? 1 : c); ++j) {
                    dequantize_run(from + i * pitch + j, to + i * step + j * a.dst_c, adjacent ? c : 1, a.zero, a.scale);
                }
            }
        }
    });
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
