// Register tiles of the convolution: sums of products over groups, and what becomes of them.
#pragma once
#include "epilogue_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

enum { BLOCK = LANES * COLS, FIP_BLOCK = LANES * FIP_COLS };

// Where the next weights lie, to be brought into the second cache while the present tile is computed: one line per step,
// without a branch. Weights of a single image are read once, and the processor's own prefetching stops at page borders.
// Measured on Zen 4: 256 channels at 14 x 14, one image, 0.32 -> 0.25 ms; direct kernels gain nothing and go without.
static inline int64_t ahead_step(int64_t bytes, int32_t parts) { return bytes / parts / 64 * 64; }
BITDIAL_INLINE void fetch(const int8_t*& ahead) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += 64;
}

// Horner's rule between groups: all sums of a tile, shifted.
template <int R, int N>
BITDIAL_INLINE void shift_tile(vi (&a)[R][N], int32_t shift) {
    if (!shift) return;
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
        _Pragma("GCC unroll 8") for (int j = 0; j < N; j++) a[i][j] = shift_left(a[i][j], shift);
}

// a[i][j] += dot products of pixel i with the outputs of vector j, over all groups of the list, with their shifts.
// NC: how many of the block's vectors are computed; narrow layers fill less than a block.
template <int R, bool AHEAD, int NC>
BITDIAL_INLINE void dot_groups(vi (&a)[R][NC], const uint8_t* const* in,
                                                             const GroupList& list, const int8_t* packed, int32_t taps,
                                                             const int32_t* tap_offset, const int8_t* ahead) {
    const uint8_t* q[R];
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) q[i] = in[i];
    for (int32_t g = 0; g < list.count; g++) {
        const Group& group = list.groups[g];
        shift_tile(a, group.shift);
        const int8_t* w = packed + group.weights;
        for (int32_t t = 0; t < taps; t++) {
            int64_t o = tap_offset[t] + group.channel;
            for (int32_t u = 0; u < group.units; u++, o += 4, w += 4 * LANES * COLS) {
                if (AHEAD) fetch(ahead);
                vi b[NC];
                _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) b[j] = load(w + 4 * LANES * j);
                _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) {
                    const vi x = broadcast4(q[i] + o);
                    _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) a[i][j] = dot(a[i][j], x, b[j]);
                }
            }
        }
    }
    shift_tile(a, list.final_shift);
}

// As dot_groups, for operands so narrow that eight products fit 16 bits (the caller proves it).
template <int R, int NC>
BITDIAL_INLINE void narrow_groups(vi (&a)[R][NC], const uint8_t* const* in,
                                                                const GroupList& list, const int8_t* packed, int32_t taps,
                                                                const int32_t* tap_offset, const int8_t* ahead) {
    const int64_t quad = 4 * LANES * COLS;
    for (int32_t g = 0; g < list.count; g++) {
        const Group& group = list.groups[g];
        shift_tile(a, group.shift);
        const int8_t* w = packed + group.weights;
        for (int32_t t = 0; t < taps; t++) {
            int64_t o = tap_offset[t] + group.channel;
            int32_t u = group.units;
            for (; u >= 4; u -= 4, o += 16, w += 4 * quad) {
                fetch(ahead);
                _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) {
                    const uint8_t* q = in[i] + o;
                    const vi x0 = broadcast4(q), x1 = broadcast4(q + 4), x2 = broadcast4(q + 8), x3 = broadcast4(q + 12);
                    _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++)
                        a[i][j] = dot_narrow(a[i][j], x0, x1, x2, x3, w + 4 * LANES * j, quad);
                }
            }
            for (; u > 0; u--, o += 4, w += quad) {
                _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
                    _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++)
                        a[i][j] = dot_pairs(a[i][j], broadcast4(in[i] + o), load(w + 4 * LANES * j));
            }
        }
    }
    shift_tile(a, list.final_shift);
}

// Fast inner product: a[i][j] += (x1 + c + w2)(x2 + c + w1 - c) per pair of channels k and k + 4 of an octet.
template <int R>
BITDIAL_INLINE void fip_groups(vi (&a)[R][FIP_COLS], const uint8_t* const* in,
                                                             const GroupList& list, const int8_t* packed, int32_t taps,
                                                             const int32_t* tap_offset, const int8_t* ahead) {
    const uint8_t* q[R];
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) q[i] = in[i];
    for (int32_t g = 0; g < list.count; g++) {
        const Group& group = list.groups[g];
        shift_tile(a, group.shift);
        const int8_t* w = packed + group.weights;
        for (int32_t t = 0; t < taps; t++) {
            int64_t o = tap_offset[t] + group.channel;
            for (int32_t u = 0; u < group.units; u++, o += 8, w += 8 * LANES * FIP_COLS) {
                fetch(ahead);
                vi e[FIP_COLS], d[FIP_COLS];
                _Pragma("GCC unroll 8") for (int j = 0; j < FIP_COLS; j++) {
                    e[j] = load(w + 4 * LANES * j);
                    d[j] = load(w + 4 * LANES * (FIP_COLS + j));
                }
                _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) {
                    const vi x = broadcast4(q[i] + o), y = broadcast4(q[i] + o + 4);
                    _Pragma("GCC unroll 8") for (int j = 0; j < FIP_COLS; j++)
                        a[i][j] = dot(a[i][j], add_bytes(x, d[j]), add_bytes(y, e[j]));
                }
            }
        }
    }
    shift_tile(a, list.final_shift);
}

// What becomes of a tile's sums: stored as int32 rows of stride BLOCK, or (sums is null) added to the rows of `init` (null:
// none) and finished.
template <bool BIASED, int R, int NC>
BITDIAL_INLINE void end_tile(const ConvArgs& c, vi (&a)[R][NC], const int32_t* init,
                                                           int32_t* sums, int32_t k, const Pixel* pixels) {
    if (sums) {
        _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
            _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) store(sums + i * BLOCK + j * LANES, a[i][j]);
        return;
    }
    if (init) {
        _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
            _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++)
                a[i][j] = add(a[i][j], load(init + i * BLOCK + j * LANES));
    }
    finish_rows<BIASED>(c.epilogue, a, k, c.outputs - k, pixels);
}

// Sums to begin with: the bias where a tile is finished at once and no shift comes after.
template <bool BIASED, int R, int NC>
BITDIAL_INLINE void begin_tile(const ConvArgs& c, vi (&a)[R][NC], const int32_t* sums,
                                                             int32_t k) {
    _Pragma("GCC unroll 4") for (int j = 0; j < NC; j++) {
        const vi b = BIASED && !sums ? load(c.epilogue.bias + k + j * LANES) : zero();
        _Pragma("GCC unroll 16") for (int i = 0; i < R; i++) a[i][j] = b;
    }
}

// R pixels, one block of outputs, dot form. LOW: the operands are low values.
template <int R, bool LOW, int NC>
static __attribute__((noinline)) void dot_tile(const ConvArgs& c, const GroupList& list, const int8_t* packed, int32_t taps,
                                               const int32_t* tap_offset, const int8_t* ahead, const uint8_t* const* in,
                                               const int32_t* init, int32_t* sums, int32_t k, const Pixel* pixels) {
    vi a[R][NC];
    begin_tile<!LOW>(c, a, sums, k);
    if constexpr (LOW && NARROW)
        narrow_groups<R, NC>(a, in, list, packed, taps, tap_offset, ahead);
    else
        dot_groups<R, LOW, NC>(a, in, list, packed, taps, tap_offset, ahead);
    end_tile<!LOW>(c, a, init, sums, k, pixels);
}

// R pixels, FIP_BLOCK outputs. row: what each pixel's products of its own are, to be subtracted; null for none.
template <int R>
static __attribute__((noinline)) void fip_tile(const ConvArgs& c, const GroupList& list, const int8_t* packed, int32_t taps,
                                               const int32_t* tap_offset, const int8_t* ahead, const uint8_t* const* in, const int32_t* row,
                                               int32_t* sums, int64_t sums_stride, int32_t k, const Pixel* pixels) {
    vi a[R][FIP_COLS];
    _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
        _Pragma("GCC unroll 8") for (int j = 0; j < FIP_COLS; j++) a[i][j] = zero();
    fip_groups<R>(a, in, list, packed, taps, tap_offset, ahead);
    if (row) {
        _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
            _Pragma("GCC unroll 8") for (int j = 0; j < FIP_COLS; j++) a[i][j] = sub(a[i][j], set(row[i]));
    }
    if (sums) {
        _Pragma("GCC unroll 16") for (int i = 0; i < R; i++)
            _Pragma("GCC unroll 8") for (int j = 0; j < FIP_COLS; j++) store(sums + i * sums_stride + j * LANES, a[i][j]);
        return;
    }
    const int32_t left = c.outputs - k;
    finish_rows<false>(c.epilogue, a, k, left, pixels);
}

// outputs: of this block.
template <bool LOW>
static inline void dot_rows(int rows, int32_t outputs, const ConvArgs& c, const GroupList& list, const int8_t* packed,
                            int32_t taps, const int32_t* tap_offset, const int8_t* ahead, const uint8_t* const* in,
                            const int32_t* init, int32_t* sums, int32_t k, const Pixel* pixels) {
    const int vectors = (outputs + LANES - 1) / LANES;
    if constexpr (!LOW && TALL_ROWS > 0)
        if (rows == TALL_ROWS)
            return with_count<2>(vectors, [&](auto n) BITDIAL_ALWAYS_INLINE {
                dot_tile<TALL_ROWS, LOW, decltype(n)::value>(c, list, packed, taps, tap_offset, ahead, in, init, sums, k, pixels);
            });
    with_count<COLS>(vectors, [&](auto n) BITDIAL_ALWAYS_INLINE {
        with_count<ROWS>(rows, [&](auto r) BITDIAL_ALWAYS_INLINE {
            dot_tile<decltype(r)::value, LOW, decltype(n)::value>(c, list, packed, taps, tap_offset, ahead, in, init, sums, k,
                                                                  pixels);
        });
    });
}

static inline void fip_rows(int rows, const ConvArgs& c, const GroupList& list, const int8_t* packed, int32_t taps,
                            const int32_t* tap_offset, const int8_t* ahead, const uint8_t* const* in, const int32_t* row, int32_t* sums,
                            int64_t sums_stride, int32_t k, const Pixel* pixels) {
    with_count<FIP_ROWS>(rows, [&](auto r) BITDIAL_ALWAYS_INLINE {
        fip_tile<decltype(r)::value>(c, list, packed, taps, tap_offset, ahead, in, row, sums, sums_stride, k, pixels);
    });
}

// Pixels cut into register tiles of nearly equal size, larger ones first (few changes of size: few mispredicted jumps).
struct Tiling {
    int32_t tiles, base, larger;
    Tiling(int32_t count, int32_t rows) : tiles((count + rows - 1) / rows), base(count / tiles), larger(count % tiles) {}
    int32_t rows(int32_t t) const { return base + (t < larger); }
};

}  // namespace BITDIAL_ISA
}  // namespace bitdial
