/* Convolutions (linear layers: of one tap). Rows are taken in blocks; where a group is low, the block's weights are made in
 * scratch memory first. Scratch: two columns, sums of the rows, the block's rows (where weights are made). */
FQ_KERNEL void fq_conv(const fq_layer *l, const fq_places *p, int32_t ratio) {
    const int32_t *bias = l->bias + ratio * l->outputs;
    const int32_t pixels = l->out_h * l->out_w, rows = l->outputs / l->conv_groups;
    fq_column *column0 = (fq_column *)(void *)p->scratch, *column1 = column0 + l->row;
    fq_int *sums = (fq_int *)(void *)(p->scratch + 4 * l->row); /* of rows; and what only some targets need */
    int8_t *own = (int8_t *)(p->scratch + 4 * l->row + 4 * rows);
    (void)sums;
    for (int32_t cg = 0; cg < l->conv_groups; ++cg) {
        const uint8_t *low = 0;
        int32_t block = rows;
        for (int32_t g = 0; l->low && g < l->groups_per; ++g) {
            const uint8_t *flags = l->low + (ratio * l->conv_groups + cg) * l->groups_per;
            if (flags[g]) {
                low = flags;
                if (l->makes) block = l->block;
            }
        }
        for (int32_t r = 0; r < rows; r += block) {
            const int32_t n = rows - r < block ? rows - r : block, first = cg * rows + r;
            const int8_t *weight = l->weight + first * l->stored_row;
#if FQ_DSP && FQ_FOURS
            if (low && l->fours) {
                fq_conv_fours(l, p, bias, cg, first, n, low, weight, column0, column1, own);
                continue;
            }
#endif
            if (low && l->makes) {
                FQ_MAKE_WEIGHTS(l, weight, first, n, l->groups + cg * l->groups_per, low, own);
                weight = own;
            }
#if FQ_BYTES
            for (int32_t i = 0; i < n; ++i) {
                int32_t sum = 0;
                for (int32_t k = 0; !l->in_signed && k < l->row; ++k) sum += weight[i * l->row + k];
                sums[i] = 128 * sum;
            }
#endif
            for (int32_t pixel = 0; pixel < pixels; pixel += 2) {
                const int32_t two = pixel + 1 < pixels;
                fq_gather(l, p->x, cg, pixel, low, column0);
                if (two) fq_gather(l, p->x, cg, pixel + 1, low, column1);
                for (int32_t i = 0; i < n; i += 2) {
                    const int8_t *w0 = weight + i * l->row, *w1 = i + 1 < n ? w0 + l->row : w0;
                    int32_t s[4] = {0, 0, 0, 0};
#if FQ_BYTES
                    s[0] = s[1] = sums[i];
                    if (i + 1 < n) s[2] = s[3] = sums[i + 1];
#endif
                    fq_products(w0, w1, column0, two ? column1 : column0, l->row, s);
                    fq_finish(l, p, bias, pixel, first + i, s[0]);
                    if (two) fq_finish(l, p, bias, pixel + 1, first + i, s[1]);
                    if (i + 1 < n) {
                        fq_finish(l, p, bias, pixel, first + i + 1, s[2]);
                        if (two) fq_finish(l, p, bias, pixel + 1, first + i + 1, s[3]);
                    }
                }
            }
        }
    }
}
