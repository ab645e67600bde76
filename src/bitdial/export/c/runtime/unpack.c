/* Rows of weights from packed ones: low groups hold two values a byte, value + 8 in the low nibble first; the others hold
 * bytes. */
static void fq_unpack_weights(const fq_layer *l, const int8_t *from, int32_t first, int32_t n, const fq_group *groups,
                              const uint8_t *low, int8_t *to) {
    for (int32_t r = 0; r < n; ++r, to += l->row) {
        const uint8_t *shifts = l->weight_shift + (first + r) / l->shift_rows * l->groups_per;
        for (int32_t g = 0; g < l->groups_per; ++g) {
            const int32_t a = groups[g].offset, b = g + 1 < l->groups_per ? groups[g + 1].offset : l->row;
            if (!low[g]) {
                for (int32_t i = a; i < b; ++i) to[i] = *from++;
                continue;
            }
            const int32_t scale = 1 << shifts[g];
            for (int32_t i = a; i < b; i += 2) {
                const uint8_t pair = (uint8_t)*from++;
                to[i] = (int8_t)(((pair & 15) - 8) * scale);
                to[i + 1] = (int8_t)(((pair >> 4) - 8) * scale);
            }
        }
    }
}
