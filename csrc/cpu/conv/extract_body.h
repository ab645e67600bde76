// Extraction of a whole tensor or of single pixels (see ExtractArgs), and what dynamic shifts are chosen by.
#pragma once
#include "../simd/simd.h"
#include "conv_args.h"

namespace bitdial {
namespace BITDIAL_ISA {

// w pixels, one pitch apart.
static void extract_run(const ExtractArgs& a, const uint8_t* from, int64_t from_pitch, uint8_t* to, int64_t to_pitch, int32_t w) {
#if BITDIAL_EXTRACT_BYTES
    if (a.src.c < BYTES && BYTES % a.src.c == 0 && from_pitch == a.src.c && to_pitch == a.src.c) {
        // Adjacent pixels of few channels: whole vectors of several pixels, for which the parameters are repeated.
        const uint8_t* b = a.bytes;
        const ByteExtraction l = {load(b), load(b + BYTES), load(b + 2 * BYTES), load(b + 3 * BYTES), load(b + 4 * BYTES),
                                load(b + 5 * BYTES), load(b + 6 * BYTES), load(b + 7 * BYTES), load(b + 8 * BYTES),
                                set_bytes(a.offset)};
        const int32_t all = w * a.src.c;
        for (int32_t x = 0; x < all; x += BYTES) {
            const int n = all - x < BYTES ? all - x : BYTES;
            store(to + x, extract_bytes(load(from + x, n), l, a.zero != 0), n);
        }
        return;
    }
    for (int32_t c = 0; c < a.src.c; c += BYTES) {
        const uint8_t* b = a.bytes + int64_t(c) * 9;
        const ByteExtraction l = {load(b), load(b + BYTES), load(b + 2 * BYTES), load(b + 3 * BYTES), load(b + 4 * BYTES),
                                load(b + 5 * BYTES), load(b + 6 * BYTES), load(b + 7 * BYTES), load(b + 8 * BYTES),
                                set_bytes(a.offset)};
        const int n = a.src.c - c < BYTES ? a.src.c - c : BYTES;
        if (a.zero)
            for (int32_t x = 0; x < w; x++)
                store(to + x * to_pitch + c, extract_bytes(load(from + x * from_pitch + c, n), l, true), n);
        else
            for (int32_t x = 0; x < w; x++)
                store(to + x * to_pitch + c, extract_bytes(load(from + x * from_pitch + c, n), l, false), n);
    }
#else
    const vi zero_in = set(a.zero), offset = set(a.offset);
    for (int32_t c = 0; c < a.src.c; c += LANES) {
        const vi shift = load(a.shift + c), half = load(a.half + c), lo = load(a.lo + c), hi = load(a.hi + c);
        const vi back = load(a.back + c);
        const int lanes = a.src.c - c < LANES ? a.src.c - c : LANES;
        for (int32_t x = 0; x < w; x++) {
            const vi v = sub(load_bytes_wide(from + x * from_pitch + c, lanes), zero_in);
            const vi q = shift_left_each(extract(v, shift, half, lo, hi), back);
            store_bytes(to + x * to_pitch + c, add(q, offset), lanes);
        }
    }
#endif
}

void extract(const ExtractArgs& a, int32_t row0, int32_t row1) {
    for (int32_t r = row0; r < row1; r++) {
        const int32_t n = r / a.src.h, y = r % a.src.h;
        extract_run(a, a.src.data + n * a.src.pitch_n + y * a.src.pitch_y, a.src.pitch_x,
                  a.dst.data + n * a.dst.pitch_n + y * a.dst.pitch_y, a.dst.pitch_x, a.src.w);
    }
}

// Plain loops over bytes, which compilers turn into vectors of whatever width the set has. One row of pixels, N channels.
template <bool CENTRED, int N>
static void or_pixels(const uint8_t* p, int64_t pitch, int32_t w, uint8_t* into) {
    uint8_t seen[N];
    for (int c = 0; c < N; c++) seen[c] = into[c];
    for (int32_t x = 0; x < w; x++, p += pitch)
        for (int c = 0; c < N; c++) {
            const uint8_t b = p[c], above = static_cast<uint8_t>(b - 128), below = static_cast<uint8_t>(128 - b);
            seen[c] |= !CENTRED ? b : b > 128 ? above : below;
        }
    for (int c = 0; c < N; c++) into[c] = seen[c];
}

template <bool CENTRED>
static void or_magnitudes(const ConstByteView& v, int32_t channel0, int32_t channel1, uint8_t* into) {
    for (int32_t c = channel0; c < channel1; c++) into[c] = 0;
    for (int32_t r = 0; r < v.n * v.h; r++) {
        const uint8_t* row = v.data + r / v.h * v.pitch_n + r % v.h * v.pitch_y;
        for (int32_t c = channel0, left; (left = channel1 - c) > 0;) {
            if (left >= 64)
                or_pixels<CENTRED, 64>(row + c, v.pitch_x, v.w, into + c), c += 64;
            else if (left >= 32)
                or_pixels<CENTRED, 32>(row + c, v.pitch_x, v.w, into + c), c += 32;
            else if (left >= 16)
                or_pixels<CENTRED, 16>(row + c, v.pitch_x, v.w, into + c), c += 16;
            else if (left >= 8)
                or_pixels<CENTRED, 8>(row + c, v.pitch_x, v.w, into + c), c += 8;
            else
                or_pixels<CENTRED, 1>(row + c, v.pitch_x, v.w, into + c), c++;
        }
    }
}

void magnitudes(const ConstByteView& v, int32_t zero, int32_t channel0, int32_t channel1, uint8_t* into) {
    if (zero)
        or_magnitudes<true>(v, channel0, channel1, into);
    else
        or_magnitudes<false>(v, channel0, channel1, into);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
