// Attention of some rows of one head: scores, softmax and the product with the values, a few rows at a time.
#pragma once
#include "product_body.h"
#include "softmax_body.h"

namespace bitdial {
namespace BITDIAL_ISA {

struct AttentionPlan {
    int32_t depth_groups, key_groups;
    int64_t keys, width;  // padded columns of the two products
    int64_t q_pitch, p_pitch, sums_pitch;
    int64_t v, q, sums, p, bytes;  // where they lie in scratch memory, behind the packed keys
};
static AttentionPlan plan_attention(const AttentionArgs& a) {
    AttentionPlan p;
    p.depth_groups = groups_of(a.depth);
    p.key_groups = groups_of(a.columns);
    p.keys = rounded_up(a.columns, SUM_LANES);
    p.width = rounded_up(a.width, LANES);
    p.q_pitch = 4 * int64_t{p.depth_groups};
    p.p_pitch = p.keys * WIDTH;
    p.v = rounded_up(p.depth_groups * p.keys * 4, 64);
    p.q = p.v + rounded_up(p.key_groups * p.width * 4, 64);
    p.sums_pitch = p.keys > p.width ? p.keys : p.width;  // the values' sums take the place of the scores
    p.sums = p.q + rounded_up(p.q_pitch * ROWS, 64);
    p.p = p.sums + rounded_up(p.sums_pitch * 4 * ROWS, 64);
    p.bytes = p.p + rounded_up(p.p_pitch * ROWS, 64);
    return p;
}
int64_t attention_scratch(const AttentionArgs& a) { return plan_attention(a).bytes; }

// Operations that scores rarely meet; compilers make vectors of them.
static inline vf divided(vf a, vf b) {
    float x[LANES], y[LANES];
    store(x, a);
    store(y, b);
    for (int i = 0; i < LANES; i++) x[i] /= y[i];
    return load(x);
}
static inline vf chosen(vi which, vf a, vf b) {
    int32_t w[LANES];
    float x[LANES], y[LANES];
    store(w, which);
    store(x, a);
    store(y, b);
    for (int i = 0; i < LANES; i++) x[i] = w[i] ? x[i] : y[i];
    return load(x);
}

// The terms of one row, one after another, on one vector of scores; n: how many of them there are.
template <bool Whole>
BITDIAL_INLINE vf with_terms(vf x, const AttentionArgs& a, const uint8_t* const* rows, int32_t j,
                                                           int32_t n) {
    for (int32_t k = 0; k < a.n_terms; k++) {
        const ScoreTerm& term = a.terms[k];
        if (term.op > TERM_DIV) {
            const vi which = term.column == 0 ? set(*rows[k]) : load_bytes_wide(rows[k] + j, n);
            const vf value = set(term.value);
            x = term.op == TERM_FILL ? chosen(which, value, x) : chosen(which, x, value);
            continue;
        }
        const float* from = reinterpret_cast<const float*>(rows[k]);
        const vf y = term.column == 0 ? set(*from) : Whole ? load(from + j) : load(from + j, first(n));
        switch (term.op) {
            case TERM_ADD: x = add(x, y); break;
            case TERM_MUL: x = mul(x, y); break;
            case TERM_SUB: x = sub(x, y); break;
            default: x = divided(x, y);
        }
    }
    return x;
}

// One row of sums -> scores in their place, padded with -inf; returns the largest.
static inline float scores_row(const AttentionArgs& a, const int32_t* sums, float* x, int32_t padded,
                               const uint8_t* const* rows) {
    vf top = set(kMinusInfinity);
    const vf m = set(a.m);
    int32_t j = 0;
    for (; j + LANES <= a.columns; j += LANES) {
        const vf t = with_terms<true>(mul(to_float(load(sums + j)), m), a, rows, j, LANES);
        store(x + j, t);
        top = larger(t, top);
    }
    for (; j < padded; j += LANES) {
        const int32_t n = a.columns > j ? a.columns - j : 0;
        const vf t = first_or(with_terms<false>(mul(to_float(load(sums + j)), m), a, rows, j, n), first(n), set(kMinusInfinity));
        store(x + j, t);
        top = larger(t, top);
    }
    return max_lanes(top);
}

// Exponentials and the inverse of their sum -> p as a row of a left operand.
static inline void weights_row(const AttentionArgs& a, const float* x, int32_t padded, float inverse_, uint8_t* p) {
    const vf inverse = set(inverse_), factor = set(a.factor), lo = set(a.lo), hi = set(a.hi);
    for (int32_t j = 0; j < padded; j += LANES)
        store_group(p + j * WIDTH, round_even(clamp(mul(mul(load(x + j), inverse), factor), lo, hi)));
}

enum { MOST_TERMS = 4 };

template <bool U>
static void attention_unit(const AttentionArgs& a, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t* scratch) {
    const AttentionPlan plan = plan_attention(a);
    uint8_t *k = scratch, *v = scratch + plan.v, *q = scratch + plan.q, *p = scratch + plan.p;
    int32_t* sums = reinterpret_cast<int32_t*>(scratch + plan.sums);
    pack_right(a.k, a.k.data + n * a.k.sample + a.k.heads[head], a.depth, a.columns, plan.keys, U, k);
    pack_right(a.v, a.v.data + n * a.v.sample + a.v.heads[head], a.columns, a.width, plan.width, true, v);
    const uint8_t* from = a.q.data + n * a.q.sample + a.q.heads[head];
    const int64_t out = n * a.out.sample + a.out.heads[head];
    const int32_t correction = row_correction(a.q, a.k);
    const int32_t v_correction = GROUP == 4 && a.v.zero == 0 ? 128 : 0;
    const int32_t padded = static_cast<int32_t>(plan.keys);
    const uint8_t* heads[MOST_TERMS];
    for (int32_t t = 0; t < a.n_terms; t++) {
        const ScoreTerm& term = a.terms[t];
        heads[t] = term.data + (n * term.sample + term.heads[head]) * term.item();
    }
    for (int32_t row = row0; row < row1; row += ROWS) {
        const int32_t rows = row1 - row < ROWS ? row1 - row : ROWS;
        int32_t start[ROWS];
        for (int32_t i = 0; i < rows; i++)
            start[i] = wrapped_product(correction, pack_row(a.q, from + (row + i) * a.q.outer, a.depth, q + i * plan.q_pitch));
        multiply_rows<U, ROWS>(rows, q, plan.q_pitch, start, k, 4 * plan.keys, plan.depth_groups, padded / LANES, sums,
                               plan.sums_pitch);
        // Step by step for all rows, so that none waits for its own maximum or sum.
        float found[ROWS];
        for (int32_t i = 0; i < rows; i++) {
            const uint8_t* terms[MOST_TERMS];
            for (int32_t t = 0; t < a.n_terms; t++) terms[t] = heads[t] + (row + i) * a.terms[t].row * a.terms[t].item();
            int32_t* own = sums + i * plan.sums_pitch;
            found[i] = scores_row(a, own, reinterpret_cast<float*>(own), padded, terms);
        }
        for (int32_t i = 0; i < rows; i++)
            found[i] = exponentials(reinterpret_cast<float*>(sums + i * plan.sums_pitch), padded, found[i]);
        for (int32_t i = 0; i < rows; i++) {
            uint8_t* to = p + i * plan.p_pitch;
            weights_row(a, reinterpret_cast<const float*>(sums + i * plan.sums_pitch), padded, found[i], to);
            int32_t total = 0;
            if (v_correction)
                for (int32_t j = 0; j < a.columns; j++) total += to[j];
            start[i] = wrapped_product(v_correction, total);
        }
        multiply_rows<true, ROWS>(rows, p, plan.p_pitch, start, v, 4 * plan.width, plan.key_groups,
                                  static_cast<int32_t>(plan.width / LANES), sums, plan.sums_pitch);
        for (int32_t i = 0; i < rows; i++)
            finish_output(a.out, out + (row + i) * a.out.row, a.width, sums + i * plan.sums_pitch);
    }
}
void attention(const AttentionArgs& a, int32_t n, int32_t head, int32_t row0, int32_t row1, uint8_t* scratch) {
    if (a.q.zero == 0)
        attention_unit<true>(a, n, head, row0, row1, scratch);
    else
        attention_unit<false>(a, n, head, row0, row1, scratch);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
