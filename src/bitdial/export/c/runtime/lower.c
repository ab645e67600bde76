/* Rows of weights as a ratio has them: 8 bits, or read back from low precision where a group is low:
 * clamp(rne(w / 2^shift)) * 2^shift. */
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
            const int8_t *table = l->lower_weight + 256 * shifts[g];
            const int32_t scale = 1 << shifts[g];
            for (int32_t i = a; i < b; ++i) to[i] = (int8_t)(table[(uint8_t)from[i]] * scale);
        }
    }
}
