// The convolution kernels of conv_args.h, generic over an instruction set.
#pragma once
#include "epilogue_body.h"
#include "extract_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

enum { BLOCK = LANES * COLS, FIP_BLOCK = LANES * FIP_COLS, WIDE = COLS };

Facts facts() {
    return {BLOCK, FIP_BLOCK, BYTES, ROWS, HAS_FIP, NARROW, BITDIAL_SPLIT, SATURATES, BITDIAL_EXTRACT_BYTES};
}

// Where the next weights lie, to be brought into the second cache while the present tile is computed: one line per step,
// without a branch. Weights of a single image are read once, and the processor's own prefetching stops at page borders.
// Measured on Zen 4: 256 channels at 14 x 14, one image, 0.32 -> 0.25 ms; direct kernels gain nothing and go without.
static inline int64_t ahead_step(int64_t bytes, int32_t parts) { return bytes / parts / 64 * 64; }
BITDIAL_INLINE void fetch(const int8_t*& ahead) {
    __builtin_prefetch(ahead, 0, 2);
    ahead += 64;
}

// ---- register tiles ------------------------------------------------------------------------------------------------

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

#if BITDIAL_SPLIT
#include "split_body.h"
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

// Sum over the low octets of one pixel of (x1 + c) x2, shifted: what the fast inner product must subtract, as lanes.
static inline vi pair_products(const uint8_t* x, const ConvArgs& c, int c_offset) {
    vi total = zero();
    const vi offset = set_bytes(c_offset);
    for (int32_t b = 0, l = 0; b < c.low_bytes; b += BYTES, l += LANES) {
        const vi u = load(x + b);
        const vi d = dot(zero(), u, sub_bytes(swap_fours(u), offset));
        total = add(total, shift_left_each(both(d, load(c.lane_mask + l)), load(c.lane_shift + l)));
    }
    return total;
}

static inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
static inline uint8_t* align64(uint8_t* p) {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63));
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

static inline void count_dot(const ConvArgs& c, int64_t pixels, int32_t outputs, Counters* counters) {
    const int64_t each = pixels * outputs * c.taps;
    counters->low += each * c.read_back_channels;
    counters->high += each * (c.high.channels - c.read_back_channels);
    counters->multiplications += each * c.high.channels;
}

// Bytes of one extracted pixel in scratch memory; the fast inner product reads whole vectors.
static inline int64_t extracted_row(const ConvArgs& c) {
    return c.extract_here ? int64_t(ceil_div(c.extraction.src.c, BYTES)) * BYTES : 0;
}

// Where derive_block reads: low weights at byte `b` of a group's dot form.
struct Derived {
    const uint8_t* from;
    int32_t shift, wmax;
    inline vi operator()(int64_t b) const { return low_weights(load(from + b), shift, wmax); }
};
struct StoredBytes {
    const uint8_t* from;
    inline vi operator()(int64_t b) const { return load(from + b); }
};
struct StoredNibbles {
    const uint8_t* from;
    inline vi operator()(int64_t b) const {
        const int64_t at = b / BYTES;
        vi v = load(from + at / 2 * BYTES);
        if (at % 2) v = shift_right_2(shift_right_2(v));  // what comes in from the next byte is masked away
        const vi eight = set_bytes(8);
        return sub_bytes(both(add_bytes(v, eight), set_bytes(15)), eight);
    }
};

// A group's low weights into `o`. Dot form: [tap][quad][BLOCK][4]; fip form: half h of the block's outputs, octets with the
// first four channels less the offset.
template <class Source>
static inline void derive_group(const ConvArgs& c, const Source& low, int32_t quads, int32_t half, uint8_t* o) {
    const int64_t quad = 4 * BLOCK, part = 4 * FIP_BLOCK;
    if (c.method != METHOD_FIP) {
        for (int64_t b = 0; b < c.taps * quads * quad; b += BYTES) store(o + b, low(b));
        return;
    }
    const vi offset = set_bytes(c.low_offset);
    for (int32_t t = 0; t < c.taps; t++)
        for (int32_t u = 0; u < quads; u += 2, o += 2 * part) {
            const int64_t first = (int64_t(t) * quads + u) * quad + half * part;
            for (int64_t b = 0; b < part; b += BYTES) {
                store(o + b, sub_bytes(low(first + b), offset));
                store(o + part + b, u + 1 < quads ? low(first + quad + b) : zero());
            }
        }
}

// Low weights of one block (fip: of half h of its outputs) into `to`.
static void derive_block(const ConvArgs& c, int32_t block, int32_t half, int8_t* to) {
    const int8_t* from = c.plane.weights ? c.plane.weights + block * c.plane.block_bytes : c.high_weights + block * c.high_block_bytes;
    for (int32_t g = 0; g < c.derive_groups; g++) {
        const DeriveGroup& d = c.derive[g];
        const uint8_t* w = reinterpret_cast<const uint8_t*>(from) + d.from;
        uint8_t* o = reinterpret_cast<uint8_t*>(to) + d.to;
        if (!c.plane.weights)
            derive_group(c, Derived{w, d.shift, c.wmax}, d.quads, half, o);
        else if (c.plane.nibbles)
            derive_group(c, StoredNibbles{w}, d.quads, half, o);
        else
            derive_group(c, StoredBytes{w}, d.quads, half, o);
    }
}

// ---- pixels: direct, and the fast inner product ----------------------------------------------------------------------

static void run_pixels(const ConvArgs& c, int32_t chunk, int32_t block0, int32_t block1, const Scratch& scratch,
                       Counters* counters) {
    const int32_t all = c.batch * c.out_h * c.out_w;
    const int32_t p0 = chunk * c.chunk, p1 = p0 + c.chunk < all ? p0 + c.chunk : all, count = p1 - p0;
    uint8_t* memory = align64(scratch.memory);
    Pixel* pixels = reinterpret_cast<Pixel*>(memory);
    memory = align64(memory + sizeof(Pixel) * count);
    const uint8_t** in = reinterpret_cast<const uint8_t**>(memory);
    memory = align64(memory + 8 * count);
    const uint8_t** low = reinterpret_cast<const uint8_t**>(memory);
    memory = align64(memory + 8 * count);
    int32_t* row = reinterpret_cast<int32_t*>(memory);
    memory = align64(memory + 4 * count);
    int32_t* sums = reinterpret_cast<int32_t*>(memory);  // [count][BLOCK]
    memory = align64(memory + 4 * int64_t(BLOCK) * count);
    uint8_t* extracted = memory;  // [count][extracted_pitch]
    const int64_t extracted_pitch = extracted_row(c);
    memory = align64(memory + extracted_pitch * count);
    int8_t* derived = reinterpret_cast<int8_t*>(memory);  // one block of low weights

    const bool fip = c.low_groups.count && c.method == METHOD_FIP;
    const bool narrow = c.low_groups.count && c.method == METHOD_NARROW;
    int32_t n = p0 / (c.out_h * c.out_w), y = p0 / c.out_w % c.out_h, x = p0 % c.out_w;
    const int64_t in_step = c.stride_w * c.src.pitch_x, out_step = c.out.pitch_x;
    const int64_t residual_step = c.residual.data ? c.residual.pitch_x : 0;
    for (int32_t begin = 0; begin < count;) {  // a row of the image, or what is left of it
        const int32_t run = count - begin < c.out_w - x ? count - begin : c.out_w - x;
        const Pixel first = pixel_at(c, n, y, x);
        const uint8_t* from = input_at(c, c.src, n, y, x);
        for (int32_t i = 0; i < run; i++) {
            pixels[begin + i] = {first.out + i * out_step, first.residual + i * residual_step};
            in[begin + i] = from + i * in_step;
        }
        if (c.extract_here) {
            uint8_t* own = extracted + begin * extracted_pitch;
            extract_run(c.extraction, from, in_step, own, extracted_pitch, run);
            for (int32_t i = 0; i < run; i++, own += extracted_pitch) {
                // The rest of a short octet stays in range, or sums of bytes would wrap: scratch memory holds anything.
                if (fip)
                    for (int32_t b = c.extraction.src.c; b % 8; b++) own[b] = static_cast<uint8_t>(c.low_offset);
                low[begin + i] = own;
                if (!fip && !narrow) in[begin + i] = own;
            }
        } else if (fip || narrow) {
            for (int32_t i = 0; i < run; i++) low[begin + i] = input_at(c, c.low, n, y, x + i);
        }
        if (fip)
            for (int32_t i = begin; i < begin + run; i++) {
                vi total = zero();
                for (int32_t t = 0; t < c.taps; t++) total = add(total, pair_products(low[i] + c.low_taps[t], c, c.low_offset));
                row[i] = sum(total);
            }
        begin += run;
        x = 0;
        if (++y == c.out_h) y = 0, n++;
    }
    const Tiling dots(count, ROWS), fips(count, FIP_ROWS);
    const int64_t fip_step = ahead_step(c.low_block_bytes, fips.tiles), dot_step = ahead_step(c.low_block_bytes, dots.tiles);
    for (int32_t b = block0; b < block1; b++) {
        const int32_t k = b * BLOCK;
        const int32_t outputs = c.outputs - k < BLOCK ? c.outputs - k : BLOCK;
        if (fip) {
            int32_t* into = c.high.count ? sums : nullptr;
            for (int32_t h = 0; h * FIP_BLOCK < outputs; h++) {
                const int8_t* w = c.derive ? derived : c.low_weights + (b * (BLOCK / FIP_BLOCK) + h) * c.low_block_bytes;
                if (c.derive) derive_block(c, b, h, derived);
                for (int32_t t = 0, i = 0, rows; t < fips.tiles; t++, i += rows) {
                    rows = fips.rows(t);
                    fip_rows(rows, c, c.low_groups, w, c.taps, c.low_taps,
                             (c.derive ? w : w + c.low_block_bytes) + t * fip_step, low + i, row + i,
                             into ? into + int64_t(i) * BLOCK + h * FIP_BLOCK : nullptr, BLOCK, k + h * FIP_BLOCK, pixels + i);
                }
            }
            const int64_t macs = int64_t(count) * outputs * c.low_groups.channels * c.taps;
            counters->low += macs;
            counters->multiplications += macs / 2;
        }
        if (narrow) {
            const int8_t* w = c.derive ? derived : c.low_weights + b * c.low_block_bytes;
            if (c.derive) derive_block(c, b, 0, derived);
            for (int32_t t = 0, i = 0, rows; t < dots.tiles; t++, i += rows) {
                rows = dots.rows(t);
                dot_rows<true>(rows, outputs, c, c.low_groups, w, c.taps, c.low_taps,
                               (c.derive ? w : w + c.low_block_bytes) + t * dot_step, low + i, nullptr,
                               c.high.count ? sums + int64_t(i) * BLOCK : nullptr, k, pixels + i);
            }
            const int64_t macs = int64_t(count) * outputs * c.low_groups.channels * c.taps;
            counters->low += macs;
            counters->multiplications += macs;
        }
        if (c.high.count) {
            high_tiles(count, outputs, c, b, in, fip || narrow ? sums : nullptr, pixels);
            count_dot(c, count, outputs, counters);
        }
    }
}


// ---- Winograd F(2x2, 3x3) --------------------------------------------------------------------------------------------

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
    for (int32_t j = 0; j < BLOCK && k + j < c.outputs; j += WIDE * LANES) {
        for (int32_t i = 0; i < count; i++) {
            vi y[4][WIDE];
            _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) {  // of narrow layers some hold nothing: not finished
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
                _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++) y[s][v] = shift_right_2(sub(y[s][v], own_products));
                if (FINISH) {
                    finish_row<WIDE, MODE, false>(c.epilogue, y[s], k + j, c.outputs - k - j, pixels[p]);
                } else {
                    _Pragma("GCC unroll 4") for (int v = 0; v < WIDE; v++)
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
    const bool fip = c.method == METHOD_WINOGRAD_FIP;
    uint8_t* memory = align64(scratch.memory);
    Pixel* pixels = reinterpret_cast<Pixel*>(memory);  // [valid pixels], tile after tile
    memory = align64(memory + sizeof(Pixel) * 4 * count);
    const uint8_t** in = reinterpret_cast<const uint8_t**>(memory);  // the same for the 8-bit input
    memory = align64(memory + 8 * 4 * count);
    int32_t* index = reinterpret_cast<int32_t*>(memory);  // [tile][4] -> pixel, or -1
    memory = align64(memory + 4 * 4 * count);
    int32_t* row = fip ? reinterpret_cast<int32_t*>(memory) : nullptr;  // [tile][4] products of the activations of their own
    memory = align64(memory + 4 * 4 * count);
    const uint8_t** v_rows = reinterpret_cast<const uint8_t**>(memory);
    memory = align64(memory + 8 * (count + FIP_ROWS));
    int32_t* m = reinterpret_cast<int32_t*>(memory);  // [position][tile][BLOCK]
    memory = align64(memory + 4 * 16 * layout.sums_stride);
    int32_t* sums = reinterpret_cast<int32_t*>(memory);  // [pixel][BLOCK] for a mixed layer
    memory = align64(memory + (c.high.count ? int64_t(4) * 4 * count * BLOCK : 0));
    uint8_t* v = memory;  // [position][tile][row_bytes]

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

// ---- the kernels ------------------------------------------------------------------------------------------------------

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
