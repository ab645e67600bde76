/* Largest value of each window; what lies outside does not count. Without padding y may be x. */
static void fq_max_pool(const uint8_t *x, uint8_t *y, const fq_window *p) {
    const uint8_t flip = p->is_signed ? 0x80u : 0u; /* makes the order of signed bytes that of unsigned ones */
    for (int32_t oy = 0; oy < p->out_h; ++oy) {
        for (int32_t ox = 0; ox < p->out_w; ++ox) {
            const int32_t top = oy * p->stride_h - p->pad_h, left = ox * p->stride_w - p->pad_w;
            for (int32_t c = 0; c < p->channels; ++c) {
                uint8_t best = 0;
                for (int32_t i = 0; i < p->kernel_h; ++i) {
                    const int32_t iy = top + i * p->dilation_h;
                    if (iy < 0 || iy >= p->in_h) continue;
                    for (int32_t j = 0; j < p->kernel_w; ++j) {
                        const int32_t ix = left + j * p->dilation_w;
                        if (ix < 0 || ix >= p->in_w) continue;
                        const uint8_t v = (uint8_t)(x[(iy * p->in_w + ix) * p->channels + c] ^ flip);
                        best = v > best ? v : best;
                    }
                }
                *y++ = (uint8_t)(best ^ flip);
            }
        }
    }
}
