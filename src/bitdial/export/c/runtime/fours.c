#if FQ_DSP
/* Four products of 4-bit operands an instruction. Both operands are made non-negative (weights + 7, signed activations + 7)
 * and two of each share a 16-bit half, 11 bits apart: (a0 + a1 2^11) (w1 + w0 2^11) has a0 w0 + a1 w1 from bit 11 on. SMLAD
 * adds up two such halves. After two of them the eight products are at most 8 * 15 * 14 = 1680 < 2^11, the four below them at
 * most 840, so that nothing is carried in, and what lies above falls off. The offsets are subtracted again with the sums of
 * activations (per pixel and group) and of weights (per row and group). */
#define FQ_PAIR(low, high) ((uint32_t)(low) | (uint32_t)(high) << 11)

/* As fq_lower_weights or fq_unpack_weights, with the low groups in the form above. sums: [n][groups_per], 7 * sum of weights
 * if activations are signed, else 0. What fills a run up to a multiple of four meets activations that are zero. */
static void fq_make_fours(const fq_layer *l, const int8_t *from, int32_t first, int32_t n, const fq_group *groups,
                          const uint8_t *low, int8_t *to, fq_int *sums) {
#if FQ_UNPACKS
    (void)first;
#endif
    for (int32_t r = 0; r < n; ++r) {
#if !FQ_UNPACKS
        const uint8_t *shifts = l->weight_shift + (first + r) / l->shift_rows * l->groups_per;
#endif
        for (int32_t g = 0; g < l->groups_per; ++g, ++sums) {
            const int32_t a = groups[g].offset, b = g + 1 < l->groups_per ? groups[g + 1].offset : l->row;
            int32_t sum = 0;
            if (!low[g]) {
                for (int32_t i = a; i < b; ++i) *to++ = *from++;
                *sums = 0;
                continue;
            }
#if FQ_UNPACKS
            for (int32_t i = a; i < b; i += 4, from += 2, to += 4) {
                const uint32_t x = (uint32_t)(uint8_t)from[0] | (uint32_t)(uint8_t)from[1] << 8; /* values + 8 */
                const uint32_t word = FQ_PAIR(x >> 4 & 15u, x & 15u) | FQ_PAIR(x >> 12, x >> 8 & 15u) << 16;
                fq_store4(to, word - (FQ_PAIR(1, 1) | FQ_PAIR(1, 1) << 16));
                if (l->in_signed) sum += (int32_t)((x & 15u) + (x >> 4 & 15u) + (x >> 8 & 15u) + (x >> 12)) - 32;
            }
#else
            const int8_t *stored = fq_stored(l, first + r, groups + g);
            const int8_t *table = stored ? 0 : l->lower_weight + 256 * shifts[g], *run = from;
            from += b - a;
            for (int32_t i = 0; i < b - a; i += 4, to += 4) {
                const int32_t w0 = fq_low(l, stored, table, run, i) + 7, w1 = fq_low(l, stored, table, run, i + 1) + 7;
                const int32_t w2 = fq_low(l, stored, table, run, i + 2) + 7, w3 = fq_low(l, stored, table, run, i + 3) + 7;
                fq_store4(to, FQ_PAIR(w1, w0) | FQ_PAIR(w3, w2) << 16);
                if (l->in_signed) sum += w0 + w1 + w2 + w3 - 28;
            }
#endif
            *sums = 7 * sum;
        }
    }
}

/* As fq_gather; low groups in the form above, with 7 times the sums of their activations in sums[groups_per]. */
static void fq_gather_fours(const fq_layer *l, const uint8_t *x, int32_t conv_group, int32_t pixel, const uint8_t *low,
                            fq_column *column, fq_int *sums) {
    const int32_t oy = pixel / l->out_w, ox = pixel - oy * l->out_w;
    const int32_t top = oy * l->stride_h - l->pad_h, left = ox * l->stride_w - l->pad_w;
    const int32_t add = l->in_signed ? 7 : 0;
    const fq_group *group = l->groups + conv_group * l->groups_per;
    x += conv_group * (l->channels / l->conv_groups);
    for (int32_t g = 0; g < l->groups_per; ++g, ++group) {
        fq_column *to = column + group->offset;
        uint32_t sum = 0, word = 0;
        int32_t k = 0;
        for (int32_t i = 0; i < l->kernel_h; ++i) {
            for (int32_t j = 0; j < l->kernel_w; ++j) {
                const uint8_t *from = fq_tap(l, x, top, left, i, j);
                if (from) from += group->first;
                if (!low[g]) {
                    fq_put(to, k, from, group->width, 0, l->in_signed);
                    k += group->width;
                } else if (from && ((group->width | k) & 3) == 0) {
                    for (const uint8_t *end = from + group->width; from < end; from += 4, k += 4, to += 2) {
                        const uint8_t *table = group->lower;
                        const uint32_t a = (uint32_t)((fq_value(table[from[0]], l->in_signed) >> group->shift) + add);
                        const uint32_t b = (uint32_t)((fq_value(table[from[1]], l->in_signed) >> group->shift) + add);
                        const uint32_t c = (uint32_t)((fq_value(table[from[2]], l->in_signed) >> group->shift) + add);
                        const uint32_t d = (uint32_t)((fq_value(table[from[3]], l->in_signed) >> group->shift) + add);
                        sum += a + b + c + d;
                        fq_store4(to, FQ_PAIR(a, b) | FQ_PAIR(c, d) << 16);
                    }
                } else {
                    for (int32_t c = 0; c < group->width; ++c, ++k) {
                        uint32_t a = (uint32_t)add;
                        if (from) a = (uint32_t)((fq_value(group->lower[from[c]], l->in_signed) >> group->shift) + add);
                        sum += a;
                        word |= a << ((k & 1) * 11 + (k & 2) * 8);
                        if ((k & 3) == 3) {
                            fq_store4(to, word);
                            to += 2;
                            word = 0;
                        }
                    }
                }
            }
        }
        if (low[g] && (k & 3)) fq_store4(to, word);
        sums[g] = (int32_t)(7 * sum);
    }
}

/* Products of one row with two columns over n values. In assembly: 13 instructions for 16 products, where the compiler spills. */
FQ_INLINE void fq_products_fours(const int8_t *w, const fq_column *a, const fq_column *b, int32_t n, int32_t *s0, int32_t *s1) {
    uint32_t sum0 = 0, sum1 = 0, t0, t1, t2, t3, t4;
    if (n >= 8) {
        __asm__ volatile(
            "1:\n\t"
            "ldrd %[t0], %[t1], [%[w]], #8\n\t"
            "ldrd %[t2], %[t3], [%[a]], #8\n\t"
            "smuad %[t4], %[t2], %[t0]\n\t"
            "smlad %[t4], %[t3], %[t1], %[t4]\n\t"
            "ldrd %[t2], %[t3], [%[b]], #8\n\t"
            "ubfx %[t4], %[t4], #11, #11\n\t"
            "add %[sum0], %[sum0], %[t4]\n\t"
            "smuad %[t4], %[t2], %[t0]\n\t"
            "smlad %[t4], %[t3], %[t1], %[t4]\n\t"
            "subs %[n], %[n], #8\n\t"
            "ubfx %[t4], %[t4], #11, #11\n\t"
            "add %[sum1], %[sum1], %[t4]\n\t"
            "bgt 1b"
            : [w] "+r"(w), [a] "+r"(a), [b] "+r"(b), [n] "+r"(n), [sum0] "+r"(sum0), [sum1] "+r"(sum1), [t0] "=&r"(t0),
              [t1] "=&r"(t1), [t2] "=&r"(t2), [t3] "=&r"(t3), [t4] "=&r"(t4)
            :
            : "cc", "memory");
    }
    *s0 = (int32_t)sum0;
    *s1 = (int32_t)sum1;
}

/* All pixels for the n rows from `first` on. own: memory for the rows, then for sums. */
static void fq_conv_fours(const fq_layer *l, const fq_places *p, const int32_t *bias, int32_t conv_group, int32_t first,
                          int32_t n, const uint8_t *low, const int8_t *stored, fq_column *column0, fq_column *column1,
                          int8_t *weight) {
    const fq_group *groups = l->groups + conv_group * l->groups_per;
    const int32_t pixels = l->out_h * l->out_w, count = l->groups_per;
    fq_int *sums0 = (fq_int *)(void *)(weight + l->block * l->row), *sums1 = sums0 + count, *row_sums = sums0 + 2 * count;
    fq_make_fours(l, stored, first, n, groups, low, weight, row_sums);
    for (int32_t pixel = 0; pixel < pixels; pixel += 2) {
        const int32_t two = pixel + 1 < pixels;
        const fq_column *other = two ? column1 : column0;
        const fq_int *other_sums = two ? sums1 : sums0;
        fq_gather_fours(l, p->x, conv_group, pixel, low, column0, sums0);
        if (two) fq_gather_fours(l, p->x, conv_group, pixel + 1, low, column1, sums1);
        for (int32_t i = 0; i < n; i += 2) {
            const int32_t next = i + 1 < n ? i + 1 : i;
            const int8_t *w0 = weight + i * l->row, *w1 = weight + next * l->row;
            const uint8_t *shift0 = l->weight_shift + (first + i) / l->shift_rows * count;
            const uint8_t *shift1 = l->weight_shift + (first + next) / l->shift_rows * count;
            int32_t s[4] = {0, 0, 0, 0};
            for (int32_t g = 0; g < count; ++g) {
                const int32_t at = groups[g].offset, length = (groups[g].length + 3) & ~3;
                if (!low[g]) {
                    fq_products(w0 + at, w1 + at, column0 + at, other + at, length, s);
                    continue;
                }
                int32_t t[4];
                const int32_t r0 = row_sums[i * count + g], r1 = row_sums[next * count + g];
                const int32_t scale0 = 1 << (groups[g].shift + shift0[g]), scale1 = 1 << (groups[g].shift + shift1[g]);
                const int32_t even = length & ~7;
                fq_products_fours(w0 + at, column0 + at, other + at, even, t, t + 1);
                fq_products_fours(w1 + at, column0 + at, other + at, even, t + 2, t + 3);
                if (even < length) { /* four more */
                    const uint32_t w = fq_load4(w0 + at + even), v = fq_load4(w1 + at + even);
                    const uint32_t a = fq_load4(column0 + at + even / 2), b = fq_load4(other + at + even / 2);
                    t[0] += (int32_t)(fq_smuad(a, w) >> 11 & 2047u);
                    t[1] += (int32_t)(fq_smuad(b, w) >> 11 & 2047u);
                    t[2] += (int32_t)(fq_smuad(a, v) >> 11 & 2047u);
                    t[3] += (int32_t)(fq_smuad(b, v) >> 11 & 2047u);
                }
                s[0] += (t[0] - sums0[g] - r0) * scale0;
                s[1] += (t[1] - other_sums[g] - r0) * scale0;
                s[2] += (t[2] - sums0[g] - r1) * scale1;
                s[3] += (t[3] - other_sums[g] - r1) * scale1;
            }
            fq_finish(l, p, bias, pixel, first + i, s[0]);
            if (two) fq_finish(l, p, bias, pixel + 1, first + i, s[1]);
            if (i + 1 < n) {
                fq_finish(l, p, bias, pixel, first + i + 1, s[2]);
                if (two) fq_finish(l, p, bias, pixel + 1, first + i + 1, s[3]);
            }
        }
    }
}
#endif
