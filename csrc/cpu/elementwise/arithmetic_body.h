// vi -> bytes: table, add, mul, rescale; see elementwise.h.
#pragma once
#include "../simd/simd.h"
#include "elementwise.h"
#include "rows.h"

namespace bitdial {
namespace BITDIAL_ISA {

// to[i] = op(from[i]) over a run. The loop works on a copy of op, whose constants then stay in registers: stores of bytes
// may alias anything in memory.
template <typename Op>
static inline void map_run(const uint8_t* from, uint8_t* to, int64_t length, const Op& shared) {
    const Op op = shared;
    int64_t i = 0;
    for (; i + BYTES <= length; i += BYTES) store(to + i, op(load(from + i)));
    const int32_t rest = static_cast<int32_t>(length - i);
    if (rest > 0) store(to + i, op(load(from + i, rest)), rest);
}

// Rows [row0, row1) of dst = op(src), by the longest runs.
template <typename Op>
static inline void map_rows(const ConstByteView& src, const ByteView& dst, int32_t row0, int32_t row1, const Op& op) {
    const int32_t h = dst.h, w = dst.w, c = dst.c;
    const int64_t step = pixel_pitch(h, w, c, src.pitch_x, src.pitch_y);
    const int64_t pitch = pixel_pitch(h, w, c, dst.pitch_x, dst.pitch_y);
    const bool whole = rows_adjoin(h, w, src.pitch_x, src.pitch_y) && rows_adjoin(h, w, dst.pitch_x, dst.pitch_y);
    const bool dense = step == c && pitch == c;
    for_each_span(row0, row1, h, whole, [&](int32_t n, int32_t y, int32_t rows) {
        const uint8_t* from = at(src, n, y, 0);
        uint8_t* to = at(dst, n, y, 0);
        const int64_t pixels = static_cast<int64_t>(rows) * w;
        if (dense) {
            map_run(from, to, pixels * c, op);
        } else {
            for (int64_t i = 0; i < pixels; ++i) map_run(from + i * step, to + i * pitch, c, op);
        }
    });
}

void table(const TableArgs& a, int32_t row0, int32_t row1) {
    const Table entries = load_table(a.table);
    map_rows(a.src, a.dst, row0, row1,
             [entries](vi index) BITDIAL_ALWAYS_INLINE { return look_up(entries, index); });
}

void rescale(const RescaleArgs& a, int32_t row0, int32_t row1) {
    const float lo = a.lo, hi = a.hi, factor = a.factor;
    const int32_t zero_src = a.zero_src;
    const uint8_t zero = static_cast<uint8_t>(a.zero_dst), shift = static_cast<uint8_t>(a.zero_dst - a.zero_src);
    const float least = lo + static_cast<float>(zero_src), most = hi + static_cast<float>(zero_src);
    if (factor == 1.0f && least >= 0.0f && least <= 255.0f && most >= 0.0f && most <= 255.0f) {
        // vi keep the order of values, so the clamp can be one of bytes. lo and hi are integers.
        const uint8_t least_byte = static_cast<uint8_t>(least), most_byte = static_cast<uint8_t>(most);
        map_rows(a.src, a.dst, row0, row1, [=](vi stored) BITDIAL_ALWAYS_INLINE {
            return add_bytes(smaller_bytes(larger_bytes(stored, set_bytes(least_byte)), set_bytes(most_byte)), set_bytes(shift));
        });
        return;
    }
    map_rows(a.src, a.dst, row0, row1, [=](vi stored) BITDIAL_ALWAYS_INLINE {
        return narrow(clamp(mul(values(stored, zero_src), fill(factor)), fill(lo), fill(hi)), set_bytes(zero));
    });
}

// to[i] = op(a[i], b[i]) over a run.
template <typename Op>
static inline void join_run(const uint8_t* a, const uint8_t* b, uint8_t* to, int64_t length, const Op& shared) {
    const Op op = shared;
    int64_t i = 0;
    for (; i + BYTES <= length; i += BYTES) store(to + i, op(load(a + i), load(b + i)));
    const int32_t rest = static_cast<int32_t>(length - i);
    if (rest > 0) store(to + i, op(load(a + i, rest), load(b + i, rest)), rest);
}

// op(x, b) with one b for all x.
template <typename Op>
struct WithSame {
    Op op;
    uint8_t same;
    inline BITDIAL_ALWAYS_INLINE vi operator()(vi x) const { return op(x, set_bytes(same)); }
};

// Rows [row0, row1) of dst = op(a, b), where b may stand still along any axis.
template <typename Op>
static inline void join_rows(const ConstByteView& a, const ConstByteView& b, int32_t b_channel, const ByteView& dst,
                             int32_t row0, int32_t row1, const Op& op) {
    const int32_t h = dst.h, w = dst.w, c = dst.c;
    const bool one_per_pixel = b_channel == 0 && c > 1;  // one byte of b for all channels of a pixel
    const int64_t step_a = pixel_pitch(h, w, c, a.pitch_x, a.pitch_y);
    const int64_t step_b = pixel_pitch(h, w, c, b.pitch_x, b.pitch_y);
    const int64_t pitch = pixel_pitch(h, w, c, dst.pitch_x, dst.pitch_y);
    const bool whole = rows_adjoin(h, w, a.pitch_x, a.pitch_y) && rows_adjoin(h, w, b.pitch_x, b.pitch_y) &&
                       rows_adjoin(h, w, dst.pitch_x, dst.pitch_y);
    const bool dense = step_a == c && pitch == c;
    for_each_span(row0, row1, h, whole, [&](int32_t n, int32_t y, int32_t rows) {
        const uint8_t* from_a = at(a, n, y, 0);
        const uint8_t* from_b = at(b, n, y, 0);
        uint8_t* to = at(dst, n, y, 0);
        const int64_t pixels = static_cast<int64_t>(rows) * w;
        if (dense && step_b == c && !one_per_pixel) {
            join_run(from_a, from_b, to, pixels * c, op);
        } else if (dense && step_b == 0 && one_per_pixel) {
            map_run(from_a, to, pixels * c, WithSame<Op>{op, *from_b});
        } else if (one_per_pixel) {
            for (int64_t i = 0; i < pixels; ++i) {
                map_run(from_a + i * step_a, to + i * pitch, c, WithSame<Op>{op, from_b[i * step_b]});
            }
        } else {
            for (int64_t i = 0; i < pixels; ++i) {
                join_run(from_a + i * step_a, from_b + i * step_b, to + i * pitch, c, op);
            }
        }
    });
}

void add(const AddArgs& a, int32_t row0, int32_t row1) {
    const float ra = a.ra, rb = a.rb, lo = a.lo, hi = a.hi;
    const int32_t zero_a = a.zero_a, zero_b = a.zero_b;
    const uint8_t zero = static_cast<uint8_t>(a.zero_out);
    join_rows(a.a, a.b, a.b_channel, a.dst, row0, row1, [=](vi x, vi y) BITDIAL_ALWAYS_INLINE {
        const Floats t = add(mul(values(x, zero_a), fill(ra)), mul(values(y, zero_b), fill(rb)));
        return narrow(clamp(t, fill(lo), fill(hi)), set_bytes(zero));
    });
}

// |a * b| < 2^16, so that the float product is the exact integer.
void mul(const MulArgs& a, int32_t row0, int32_t row1) {
    const float m = a.m, lo = a.lo, hi = a.hi;
    const int32_t zero_a = a.zero_a, zero_b = a.zero_b;
    const uint8_t zero = static_cast<uint8_t>(a.zero_out);
    join_rows(a.a, a.b, a.b_channel, a.dst, row0, row1, [=](vi x, vi y) BITDIAL_ALWAYS_INLINE {
        const Floats t = mul(mul(values(x, zero_a), values(y, zero_b)), fill(m));
        return narrow(clamp(t, fill(lo), fill(hi)), set_bytes(zero));
    });
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
