// Products of packed operands, and their epilogue. Included inside a namespace of one instruction set, after pack_body.h.

// R rows, V vectors of columns; accumulators start at what the rows' offsets need.
template <bool U, int R, int V>
static inline __attribute__((always_inline)) void multiply_tile(const uint8_t* left, int64_t pitch, const int32_t* start,
                                                                const uint8_t* right, int64_t right_pitch, int32_t groups,
                                                                vi (&acc)[R][V]) {
    _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)
        _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) acc[i][v] = set(start[i]);
    for (int32_t g = 0; g < groups; g++) {
        vi b[V];
        _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) b[v] = load(right + g * right_pitch + v * BYTES);
        _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) {
            const vi a = broadcast4(left + i * pitch + 4 * g);
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) acc[i][v] = dot_group<U>(acc[i][v], a, b[v]);
        }
    }
}

// The first `count` of V vectors from `vector` on.
template <bool U, int R, int V, typename Finish>
static inline void multiply_vectors(int32_t count, const uint8_t* left, int64_t pitch, const int32_t* start,
                                    const uint8_t* right, int64_t right_pitch, int32_t groups, int32_t vector,
                                    const Finish& finish) {
    if constexpr (V > 1) {
        if (count < V)
            return multiply_vectors<U, R, V - 1>(count, left, pitch, start, right, right_pitch, groups, vector, finish);
    }
    vi acc[R][V];
    multiply_tile<U, R, V>(left, pitch, start, right + int64_t{vector} * BYTES, right_pitch, groups, acc);
    _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)
        _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) finish(i, vector + v, acc[i][v]);
}

// finish(row, vector, accumulators) for `rows` rows (at most R) and all vectors of columns.
template <bool U, int R, typename Finish>
static inline void multiply_rows(int32_t rows, const uint8_t* left, int64_t pitch, const int32_t* start, const uint8_t* right,
                                 int64_t right_pitch, int32_t groups, int32_t vectors, const Finish& finish) {
    if constexpr (R > 1) {
        if (rows < R)
            return multiply_rows<U, R - 1>(rows, left, pitch, start, right, right_pitch, groups, vectors, finish);
    }
    int32_t tiles = (vectors + COLS - 1) / COLS;
    for (int32_t v = 0; v < vectors; tiles--) {
        const int32_t n = (vectors - v + tiles - 1) / tiles;  // tiles of equal size
        multiply_vectors<U, R, COLS>(n, left, pitch, start, right, right_pitch, groups, v, finish);
        v += n;
    }
}

// Vector `vector` of row `row` of a head's output.
static inline void finish_output(const ProductOutput& o, int64_t at, int32_t row, int32_t vector, int32_t columns, vi acc) {
    const int32_t j = vector * LANES, n = columns - j < LANES ? columns - j : LANES;
    const int64_t place = at + row * o.row + j * o.column;
    const vf t = limit(mul(to_float(acc), set_float(o.m)), set_float(o.lo), set_float(o.hi));
    if (o.is_float) {
        float* to = reinterpret_cast<float*>(o.data) + place;
        if (o.column == 1) return store_some_float(to, t, n);
        float own[LANES];
        store_float(own, t);
        for (int32_t i = 0; i < n; i++) to[i * o.column] = own[i];
        return;
    }
    const vi q = add(round_even(t), set(o.zero));
    uint8_t* to = o.data + place;
    if (o.column == 1) return store_bytes(to, q, n);
    uint8_t own[LANES];
    store_bytes(own, q, LANES);
    for (int32_t i = 0; i < n; i++) to[i * o.column] = own[i];
}

// ---- matmul --------------------------------------------------------------------------------------------------------------

struct MatMulPlan {
    int32_t groups, columns;  // columns: packed at once
    int64_t pitch, right_bytes, bytes;
};
static MatMulPlan plan_matmul(const MatMulArgs& a) {
    MatMulPlan p;
    p.groups = groups_of(a.depth);
    p.pitch = 4 * int64_t{p.groups};
    const int64_t all = rounded_up(a.columns, LANES), fit = (256 << 10) / p.pitch / LANES * LANES;
    const int64_t least = COLS * LANES;
    const int64_t columns = fit < least ? least : fit;
    p.columns = static_cast<int32_t>(columns < all ? columns : all);
    p.right_bytes = rounded_up(p.pitch * p.columns, 64);
    p.bytes = p.right_bytes + rounded_up(p.pitch * ROWS, 64);
    return p;
}
static int64_t matmul_scratch(const MatMulArgs& a) { return plan_matmul(a).bytes; }

template <bool U>
static void matmul_unit(const MatMulArgs& a, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t* scratch) {
    const MatMulPlan p = plan_matmul(a);
    uint8_t *right = scratch, *left = scratch + p.right_bytes;
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
                start[i] = correction * pack_row(a.left, l + (row + i) * a.left.outer, a.depth, left + i * p.pitch);
            multiply_rows<U, ROWS>(rows, left, p.pitch, start, right, 4 * int64_t{p.columns}, p.groups, vectors,
                                   [&](int i, int32_t v, vi acc) {
                                       finish_output(a.out, out + c * a.out.column, row + i, v, columns, acc);
                                   });
        }
    }
}
static void matmul(const MatMulArgs& a, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t* scratch) {
    if (a.left.zero == 0)
        matmul_unit<true>(a, n, head, row0, row1, scratch);
    else
        matmul_unit<false>(a, n, head, row0, row1, scratch);
}
