/* Where a group's low weights of an output are stored; 0: they are made from its 8-bit row. */
FQ_INLINE const int8_t *fq_stored(const fq_layer *l, int32_t output, const fq_group *group) {
#if FQ_STORED
    if (l->low_weight) return l->low_weight + output * l->low_row + group->low_offset;
#endif
    (void)l, (void)output, (void)group;
    return 0;
}

/* Low weight i of a group: stored, or clamp(rne(w / 2^shift)) of the 8-bit run, by the table of its shift. */
FQ_INLINE int32_t fq_low(const fq_layer *l, const int8_t *stored, const int8_t *table, const int8_t *run, int32_t i) {
#if FQ_STORED
    if (stored) return l->low_nibbles ? (int32_t)((uint8_t)stored[i / 2] >> (i & 1) * 4 & 15) - 8 : stored[i];
#endif
    (void)l, (void)stored;
    return table[(uint8_t)run[i]];
}

/* Rows of weights as a ratio has them: 8 bits, or low * 2^shift where a group is low. */
static void fq_lower_weights(const fq_layer *l, const int8_t *from, int32_t first, int32_t n, const fq_group *groups,
                             const uint8_t *low, int8_t *to) {
    for (int32_t r = 0; r < n; ++r, from += l->row, to += l->row) {
        const uint8_t *shifts = l->weight_shift + (first + r) / l->shift_rows * l->groups_per;
        for (int32_t g = 0; g < l->groups_per; ++g) {
            const int32_t a = groups[g].offset, b = g + 1 < l->groups_per ? groups[g + 1].offset : l->row;
            if (!low[g]) {
                for (int32_t i = a; i < b; ++i) to[i] = from[i];
                continue;
            }
            const int8_t *stored = fq_stored(l, first + r, groups + g);
            const int8_t *table = stored ? 0 : l->lower_weight + 256 * shifts[g];
            const int32_t scale = 1 << shifts[g];
            for (int32_t i = a; i < b; ++i) to[i] = (int8_t)(fq_low(l, stored, table, from + a, i - a) * scale);
        }
    }
}
