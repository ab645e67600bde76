/* One input channel per output, 8 bits. Weights are [kernel_h * kernel_w][outputs]. */
FQ_KERNEL void fq_depthwise(const fq_layer *l, const fq_places *p, int32_t ratio) {
    const int32_t *bias = l->bias + ratio * l->outputs;
    const int32_t multiplicity = l->outputs / l->channels;
    for (int32_t oy = 0; oy < l->out_h; ++oy) {
        const int32_t top = oy * l->stride_h - l->pad_h;
        for (int32_t ox = 0; ox < l->out_w; ++ox) {
            const int32_t left = ox * l->stride_w - l->pad_w, pixel = oy * l->out_w + ox;
            int32_t o = 0;
#if FQ_DSP
            for (; multiplicity == 1 && o + 4 <= l->outputs; o += 4) {
                int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
                for (int32_t i = 0; i < l->kernel_h; ++i) {
                    const int32_t iy = top + i * l->dilation_h;
                    if (iy < 0 || iy >= l->in_h) continue;
                    for (int32_t j = 0; j < l->kernel_w; ++j) {
                        const int32_t ix = left + j * l->dilation_w;
                        if (ix < 0 || ix >= l->in_w) continue;
                        const uint32_t x = fq_load4(p->x + (iy * l->in_w + ix) * l->channels + o);
                        const uint32_t w = fq_load4(l->weight + (i * l->kernel_w + j) * l->outputs + o);
                        const uint32_t x02 = l->in_signed ? fq_sxtb16(x) : fq_uxtb16(x);
                        const uint32_t x13 = l->in_signed ? fq_sxtb16_ror8(x) : fq_uxtb16_ror8(x);
                        const uint32_t w02 = fq_sxtb16(w), w13 = fq_sxtb16_ror8(w);
                        s0 = fq_smlabb(x02, w02, s0);
                        s1 = fq_smlabb(x13, w13, s1);
                        s2 = fq_smlatt(x02, w02, s2);
                        s3 = fq_smlatt(x13, w13, s3);
                    }
                }
                fq_finish(l, p, bias, pixel, o, s0);
                fq_finish(l, p, bias, pixel, o + 1, s1);
                fq_finish(l, p, bias, pixel, o + 2, s2);
                fq_finish(l, p, bias, pixel, o + 3, s3);
            }
#endif
            for (; o < l->outputs; ++o) {
                const int32_t c = multiplicity == 1 ? o : o / multiplicity;
                int32_t acc = 0;
                for (int32_t i = 0; i < l->kernel_h; ++i) {
                    const int32_t iy = top + i * l->dilation_h;
                    if (iy < 0 || iy >= l->in_h) continue;
                    for (int32_t j = 0; j < l->kernel_w; ++j) {
                        const int32_t ix = left + j * l->dilation_w;
                        if (ix < 0 || ix >= l->in_w) continue;
                        acc += fq_value(p->x[(iy * l->in_w + ix) * l->channels + c], l->in_signed) *
                               l->weight[(i * l->kernel_w + j) * l->outputs + o];
                    }
                }
                fq_finish(l, p, bias, pixel, o, acc);
            }
        }
    }
}
