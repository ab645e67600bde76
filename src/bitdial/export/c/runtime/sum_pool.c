/* Averages: exact sum, one factor. Without padding y may be x: a byte is written once all windows up to it are read. */
static void fq_sum_pool(const uint8_t *x, uint8_t *y, const fq_window *p) {
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            const int32_t top = oy * p->stride_h - p->pad_h, left = ox * p->stride_w - p->pad_w;
            const int32_t y0 = top < 0 ? 0 : top, x0 = left < 0 ? 0 : left;
            const int32_t y1 = top + p->kernel_h > p->in_h ? p->in_h : top + p->kernel_h;
            const int32_t x1 = left + p->kernel_w > p->in_w ? p->in_w : left + p->kernel_w;
            for (int32_t c = 0; c < p->channels; ++c) {
                int32_t sum = 0;
                for (int32_t i = y0; i < y1; ++i) {
                    const uint8_t *from = x + (i * p->in_w + x0) * p->channels + c;
                    for (int32_t j = x0; j < x1; ++j, from += p->channels) sum += fq_value(*from, p->is_signed);
                }
                *y++ = fq_round((float)sum * p->factor, p->lo, p->hi);
            }
        }
    }
}
