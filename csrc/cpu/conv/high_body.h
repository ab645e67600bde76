// The high groups of a block of outputs, in the dot form or in the split form (see SplitRun in conv_args.h); and where pixels lie.
#pragma once
#include "tiles_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

#if BITDIAL_SPLIT
// a[i][j] += dot products of pixel i with the outputs of vector j, over all runs of one block.
template <int R, int NC>
BITDIAL_INLINE void split_sums(vi (&a)[R][NC], const uint8_t* const* in, const ConvArgs& c,
                                                             const SplitRun* runs) {
    const uint8_t* q[R];
    _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) q[i] = in[i];
    for (int32_t r = 0; r < c.split_runs; r++) {
        const int32_t* place = c.split_places + runs[r].places;
        const int8_t* w = c.high_weights + runs[r].weights;
        for (const int32_t* end = place + runs[r].pairs; place < end; place++, w += 4 * BLOCK) {
            const int64_t o = *place;
            vi b[NC];
            _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) b[j] = load(w + 4 * LANES * j);
            _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) {
                const vi x = broadcast4(q[i] + o);
                _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) a[i][j] = dot_pairs(a[i][j], x, b[j]);
            }
        }
        for (const int32_t* end = place + runs[r].wide; place < end; place++, w += 8 * BLOCK) {
            const int64_t o = *place;
            vi even[NC], odd[NC];
            _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) {
                even[j] = load(w + 4 * LANES * j);
                odd[j] = load(w + 4 * LANES * (COLS + j));
            }
            _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) {
                const vi x = broadcast4(q[i] + o);
                _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) a[i][j] = dot_wide(a[i][j], x, even[j], odd[j]);
            }
        }
    }
}

template <int R, int NC>
static __attribute__((noinline)) void split_tile(const ConvArgs& c, const SplitRun* runs, const uint8_t* const* in,
                                                 const int32_t* init, int32_t* sums, int32_t k, const Pixel* pixels) {
    vi a[R][NC];
    begin_tile<true>(c, a, sums, k);
    split_sums<R, NC>(a, in, c, runs);
    end_tile<true>(c, a, init, sums, k, pixels);
}

static inline void split_rows(int rows, int32_t outputs, const ConvArgs& c, const SplitRun* runs, const uint8_t* const* in,
                              const int32_t* init, int32_t* sums, int32_t k, const Pixel* pixels) {
    with_count<COLS>((outputs + LANES - 1) / LANES, [&](auto n) BITDIAL_ALWAYS_INLINE {
        with_count<ROWS>(rows, [&](auto r) BITDIAL_ALWAYS_INLINE {
            split_tile<decltype(r)::value, decltype(n)::value>(c, runs, in, init, sums, k, pixels);
        });
    });
}
#endif

// The high groups of block b, one tile of pixels.
static inline void high_rows(int rows, int32_t outputs, const ConvArgs& c, int32_t b, const uint8_t* const* in,
                             const int32_t* init, const Pixel* pixels) {
#if BITDIAL_SPLIT
    if (c.split) return split_rows(rows, outputs, c, c.split + int64_t(b) * c.split_runs, in, init, nullptr, b * BLOCK, pixels);
#endif
    dot_rows<false>(rows, outputs, c, c.high, c.high_weights + b * c.high_block_bytes, c.taps, c.src_taps, nullptr, in, init,
                    nullptr, b * BLOCK, pixels);
}

// The high groups of block b for `count` pixels. init: rows of sums to add, or null.
static inline void high_tiles(int32_t count, int32_t outputs, const ConvArgs& c, int32_t b, const uint8_t* const* in,
                              const int32_t* init, const Pixel* pixels) {
    int32_t i = 0;
    auto tile = [&](int32_t rows) {
        high_rows(rows, outputs, c, b, in + i, init ? init + int64_t(i) * BLOCK : nullptr, pixels + i);
        i += rows;
    };
    // Few outputs leave registers for more pixels.
    while (TALL_ROWS > 0 && outputs <= 2 * LANES && count - i >= TALL_ROWS) tile(TALL_ROWS);
    if (i == count) return;
    const Tiling tiling(count - i, ROWS);
    for (int32_t t = 0; t < tiling.tiles; t++) tile(tiling.rows(t));
}

static inline void count_dot(const ConvArgs& c, int64_t pixels, int32_t outputs, Counters* counters) {
    const int64_t each = pixels * outputs * c.taps;
    counters->low += each * c.read_back_channels;
    counters->high += each * (c.high.channels - c.read_back_channels);
    counters->multiplications += each * c.high.channels;
}

static inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
// The next `count` elements of scratch memory, from a multiple of 64 bytes on.
template <typename T>
static inline T* take(uint8_t*& memory, int64_t count) {
    uint8_t* p = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
    memory = p + static_cast<int64_t>(sizeof(T)) * count;
    return reinterpret_cast<T*>(p);
}
static inline Pixel pixel_at(const ConvArgs& c, int32_t n, int32_t y, int32_t x) {
    Pixel p;
    p.out = c.out.data + n * c.out.pitch_n + y * c.out.pitch_y + x * c.out.pitch_x;
    p.residual = c.residual.data ? c.residual.data + n * c.residual.pitch_n + y * c.residual.pitch_y + x * c.residual.pitch_x
                                 : nullptr;
    return p;
}
static inline const uint8_t* input_at(const ConvArgs& c, const ConstByteView& v, int32_t n, int32_t y, int32_t x) {
    return v.data + n * v.pitch_n + int64_t(y * c.stride_h - c.pad_h) * v.pitch_y + int64_t(x * c.stride_w - c.pad_w) * v.pitch_x;
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
