// Products of packed operands, and their epilogue.
#pragma once
#include "pack_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

// R rows, V vectors of columns: sums + i * pitch_sums receives row i. Sums start at what the rows' offsets need. A function of its
// own, so that the registers are all the loop's.
template <bool U, int R, int V>
static __attribute__((noinline)) void multiply_tile(const uint8_t* left, int64_t pitch, const int32_t* start,
                                                    const uint8_t* right, int64_t right_pitch, int32_t groups, int32_t* sums,
                                                    int64_t pitch_sums) {
    vi acc[R][V];
    _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)
        _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) acc[i][v] = set(start[i]);
    for (int32_t g = 0; g < groups; g++, right += right_pitch, left += 4) {
        vi b[V];
        _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) b[v] = load(right + v * BYTES);
        _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) {
            const vi a = broadcast4(left + i * pitch);
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) acc[i][v] = dot_group<U>(acc[i][v], a, b[v]);
        }
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)
        _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) store(sums + i * pitch_sums + v * LANES, acc[i][v]);
}

// The first `count` of V vectors.
template <bool U, int R, int V>
static inline void multiply_vectors(int32_t count, const uint8_t* left, int64_t pitch, const int32_t* start,
                                    const uint8_t* right, int64_t right_pitch, int32_t groups, int32_t* sums,
                                    int64_t pitch_sums) {
    if constexpr (V > 1) {
        if (count < V)
            return multiply_vectors<U, R, V - 1>(count, left, pitch, start, right, right_pitch, groups, sums, pitch_sums);
    }
    multiply_tile<U, R, V>(left, pitch, start, right, right_pitch, groups, sums, pitch_sums);
}

// `rows` rows (at most R) and all vectors of columns.
template <bool U, int R>
static inline void multiply_rows(int32_t rows, const uint8_t* left, int64_t pitch, const int32_t* start, const uint8_t* right,
                                 int64_t right_pitch, int32_t groups, int32_t vectors, int32_t* sums, int64_t pitch_sums) {
    if constexpr (R > 1) {
        if (rows < R)
            return multiply_rows<U, R - 1>(rows, left, pitch, start, right, right_pitch, groups, vectors, sums, pitch_sums);
    }
    int32_t tiles = (vectors + COLS - 1) / COLS;
    for (int32_t v = 0; v < vectors; tiles--) {
        const int32_t n = (vectors - v + tiles - 1) / tiles;  // tiles of equal size
        multiply_vectors<U, R, COLS>(n, left, pitch, start, right + int64_t{v} * BYTES, right_pitch, groups, sums + v * LANES,
                                     pitch_sums);
        v += n;
    }
}

// A row of a head's output, from its sums; place: where its first column lies.
static inline void finish_output(const ProductOutput& o, int64_t place, int32_t columns, const int32_t* sums) {
    const vf m = set(o.m), lo = set(o.lo), hi = set(o.hi);
    const vi zero_ = set(o.zero);
    for (int32_t j = 0; j < columns; j += LANES) {
        const int32_t n = columns - j < LANES ? columns - j : LANES;
        const vf t = clamp(mul(to_float(load(sums + j)), m), lo, hi);
        if (o.is_float) {
            float* to = reinterpret_cast<float*>(o.data) + place + j * o.column;
            if (o.column == 1) {
                store(to, t, first(n));
            } else {
                float own[LANES];
                store(own, t);
                for (int32_t i = 0; i < n; i++) to[i * o.column] = own[i];
            }
            continue;
        }
        const vi q = add(round_even(t), zero_);
        uint8_t* to = o.data + place + j * o.column;
        if (o.column == 1) {
            store_bytes(to, q, n);
        } else {
            uint8_t own[LANES];
            store_bytes(own, q, LANES);
            for (int32_t i = 0; i < n; i++) to[i * o.column] = own[i];
        }
    }
}

// ---- matmul --------------------------------------------------------------------------------------------------------------

struct MatMulPlan {
    int32_t groups, columns;  // columns: packed at once
    int64_t pitch, left, sums, bytes;  // left, sums: where they lie in scratch memory, behind the packed right operand
};
static MatMulPlan plan_matmul(const MatMulArgs& a) {
    MatMulPlan p;
    p.groups = groups_of(a.depth);
    p.pitch = 4 * int64_t{p.groups};
    const int64_t all = rounded_up(a.columns, LANES), most = 16 * LANES * COLS, fit = (256 << 10) / p.pitch / LANES * LANES;
    const int64_t least = COLS * LANES, columns = fit < least ? least : fit < most ? fit : most;
    p.columns = static_cast<int32_t>(columns < all ? columns : all);
    p.left = rounded_up(p.pitch * p.columns, 64);
    p.sums = p.left + rounded_up(p.pitch * ROWS, 64);
    p.bytes = p.sums + rounded_up(4 * int64_t{p.columns} * ROWS, 64);
    return p;
}
int64_t matmul_scratch(const MatMulArgs& a) { return plan_matmul(a).bytes; }

template <bool U>
static void matmul_unit(const MatMulArgs& a, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t* scratch) {
    const MatMulPlan p = plan_matmul(a);
    uint8_t *right = scratch, *left = scratch + p.left;
    int32_t* sums = reinterpret_cast<int32_t*>(scratch + p.sums);
    const uint8_t* l = a.left.data + n * a.left.sample + a.left.heads[head];
    const uint8_t* r = a.right.data + n * a.right.sample + a.right.heads[head];
    const int64_t out = n * a.out.sample + a.out.heads[head];
    const int32_t correction = row_correction(a.left, a.right);
    for (int32_t c = 0; c < a.columns; c += p.columns) {
        const int32_t columns = a.columns - c < p.columns ? a.columns - c : p.columns;
        const int32_t vectors = (columns + LANES - 1) / LANES;
        pack_right(a.right, r + c * a.right.outer, a.depth, columns, p.columns, U, right);
        for (int32_t row = row0; row < row1; row += ROWS) {
            const int32_t rows = row1 - row < ROWS ? row1 - row : ROWS;
            int32_t start[ROWS];
            for (int32_t i = 0; i < rows; i++)
                start[i] = wrapped_product(correction, pack_row(a.left, l + (row + i) * a.left.outer, a.depth, left + i * p.pitch));
            multiply_rows<U, ROWS>(rows, left, p.pitch, start, right, 4 * int64_t{p.columns}, p.groups, vectors, sums, p.columns);
            for (int32_t i = 0; i < rows; i++)
                finish_output(a.out, out + (row + i) * a.out.row + c * a.out.column, columns, sums + int64_t{i} * p.columns);
        }
    }
}
void matmul(const MatMulArgs& a, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t* scratch) {
    if (a.left.zero == 0)
        matmul_unit<true>(a, n, head, row0, row1, scratch);
    else
        matmul_unit<false>(a, n, head, row0, row1, scratch);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
