#if FQ_DSP
#define FQ_PLACE(k) (((k) & ~3) | (((k) & 1) << 1) | (((k) >> 1) & 1)) /* 0 2 1 3: as SXTB16 takes weights apart */
#else
#define FQ_PLACE(k) (k)
#endif

FQ_INLINE fq_column fq_activation(uint8_t byte, int32_t is_signed) {
#if FQ_BYTES
    return (fq_column)(int8_t)(is_signed ? byte : (uint8_t)(byte ^ 0x80u));
#else
    return (fq_column)fq_value(byte, is_signed);
#endif
}

/* `n` channels of one pixel to positions k, k + 1, ... of a column. from 0: zeros (padding). */
FQ_INLINE void fq_put(fq_column *to, int32_t k, const uint8_t *from, int32_t n, const uint8_t *lower, int32_t is_signed) {
    if (!from) {
        const fq_column zero = fq_activation(0, is_signed);
        for (int32_t i = k; i < k + n; ++i) to[FQ_PLACE(i)] = zero;
        return;
    }
#if FQ_DSP
    if (((k | n) & 3) == 0) {
        to += k;
        for (int32_t i = 0; i < n; i += 4, to += 4) {
            const uint32_t x = lower ? (uint32_t)lower[from[i]] | (uint32_t)lower[from[i + 1]] << 8 |
                                           (uint32_t)lower[from[i + 2]] << 16 | (uint32_t)lower[from[i + 3]] << 24
                                     : fq_load4(from + i);
            fq_store4(to, is_signed ? fq_sxtb16(x) : fq_uxtb16(x));
            fq_store4(to + 2, is_signed ? fq_sxtb16_ror8(x) : fq_uxtb16_ror8(x));
        }
        return;
    }
#endif
    if (lower) {
        for (int32_t i = 0; i < n; ++i) to[FQ_PLACE(k + i)] = fq_activation(lower[from[i]], is_signed);
    } else {
        for (int32_t i = 0; i < n; ++i) to[FQ_PLACE(k + i)] = fq_activation(from[i], is_signed);
    }
}

/* The pixel of tap (i, j) seen from output `pixel`, at the first channel of a convolution group; 0 outside. */
FQ_INLINE const uint8_t *fq_tap(const fq_layer *l, const uint8_t *x, int32_t top, int32_t left, int32_t i, int32_t j) {
    const int32_t iy = top + i * l->dilation_h, ix = left + j * l->dilation_w;
    if (iy < 0 || iy >= l->in_h || ix < 0 || ix >= l->in_w) return 0;
    return x + (iy * l->in_w + ix) * l->channels;
}

/* What one output pixel of a convolution group reads, in the order of a row of weights. low: flags of the group's groups. */
static void fq_gather(const fq_layer *l, const uint8_t *x, int32_t conv_group, int32_t pixel, const uint8_t *low,
                      fq_column *column) {
    const int32_t oy = pixel / l->out_w, ox = pixel - oy * l->out_w;
    const int32_t top = oy * l->stride_h - l->pad_h, left = ox * l->stride_w - l->pad_w;
    const fq_group *groups = l->groups + conv_group * l->groups_per;
    x += conv_group * (l->channels / l->conv_groups);
    for (int32_t g = 0; g < l->groups_per; ++g) {
        const fq_group *group = groups + g;
        const uint8_t *lower = low && low[g] ? group->lower : 0;
        fq_column *to = column + group->offset;
        int32_t k = 0;
        for (int32_t i = 0; i < l->kernel_h; ++i) {
            for (int32_t j = 0; j < l->kernel_w; ++j, k += group->width) {
                const uint8_t *from = fq_tap(l, x, top, left, i, j);
                fq_put(to, k, from ? from + group->first : 0, group->width, lower, l->in_signed);
            }
        }
    }
}
