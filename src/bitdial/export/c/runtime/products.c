/* Adds to s the products of two rows of weights with two columns: s[0] row 0 column 0, s[1] row 0 column 1, s[2] row 1
 * column 0, s[3] row 1 column 1. n is a multiple of four. */
FQ_KERNEL void fq_products(const int8_t *w0, const int8_t *w1, const fq_column *a0, const fq_column *a1, int32_t n,
                           int32_t s[4]) {
    int32_t s00 = s[0], s01 = s[1], s10 = s[2], s11 = s[3], i = 0;
#if FQ_DSP
    for (; i < n; i += 4, w0 += 4, w1 += 4, a0 += 4, a1 += 4) {
        const uint32_t w = fq_load4(w0), v = fq_load4(w1);
        const uint32_t w02 = fq_sxtb16(w), w13 = fq_sxtb16_ror8(w), v02 = fq_sxtb16(v), v13 = fq_sxtb16_ror8(v);
        const uint32_t a02 = fq_load4(a0), a13 = fq_load4(a0 + 2), b02 = fq_load4(a1), b13 = fq_load4(a1 + 2);
        s00 = fq_smlad(a13, w13, fq_smlad(a02, w02, s00));
        s01 = fq_smlad(b13, w13, fq_smlad(b02, w02, s01));
        s10 = fq_smlad(a13, v13, fq_smlad(a02, v02, s10));
        s11 = fq_smlad(b13, v13, fq_smlad(b02, v02, s11));
    }
#elif FQ_BYTES && defined(__aarch64__)
    int32x4_t t00 = vdupq_n_s32(0), t01 = t00, t10 = t00, t11 = t00;
    for (; i + 16 <= n; i += 16) {
        const int8x16_t w = vld1q_s8(w0 + i), v = vld1q_s8(w1 + i), a = vld1q_s8(a0 + i), b = vld1q_s8(a1 + i);
        t00 = vdotq_s32(t00, a, w);
        t01 = vdotq_s32(t01, b, w);
        t10 = vdotq_s32(t10, a, v);
        t11 = vdotq_s32(t11, b, v);
    }
    s00 += vaddvq_s32(t00);
    s01 += vaddvq_s32(t01);
    s10 += vaddvq_s32(t10);
    s11 += vaddvq_s32(t11);
#elif FQ_BYTES
    for (; i + 16 <= n; i += 16) {
        const int8x16_t w = vld1q_s8(w0 + i), v = vld1q_s8(w1 + i), a = vld1q_s8(a0 + i), b = vld1q_s8(a1 + i);
        s00 = vmladavaq_s8(s00, a, w);
        s01 = vmladavaq_s8(s01, b, w);
        s10 = vmladavaq_s8(s10, a, v);
        s11 = vmladavaq_s8(s11, b, v);
    }
#elif FQ_NEON
    int32x4_t t00 = vdupq_n_s32(0), t01 = t00, t10 = t00, t11 = t00;
    for (; i + 8 <= n; i += 8) {
        const int16x8_t w = vmovl_s8(vld1_s8(w0 + i)), v = vmovl_s8(vld1_s8(w1 + i));
        const int16x8_t a = vld1q_s16(a0 + i), b = vld1q_s16(a1 + i);
        t00 = vmlal_high_s16(vmlal_s16(t00, vget_low_s16(a), vget_low_s16(w)), a, w);
        t01 = vmlal_high_s16(vmlal_s16(t01, vget_low_s16(b), vget_low_s16(w)), b, w);
        t10 = vmlal_high_s16(vmlal_s16(t10, vget_low_s16(a), vget_low_s16(v)), a, v);
        t11 = vmlal_high_s16(vmlal_s16(t11, vget_low_s16(b), vget_low_s16(v)), b, v);
    }
    s00 += vaddvq_s32(t00);
    s01 += vaddvq_s32(t01);
    s10 += vaddvq_s32(t10);
    s11 += vaddvq_s32(t11);
#endif
#if !FQ_DSP
    for (; i < n; ++i) {
        s00 += w0[i] * a0[i];
        s01 += w0[i] * a1[i];
        s10 += w1[i] * a0[i];
        s11 += w1[i] * a1[i];
    }
#endif
    s[0] = s00;
    s[1] = s01;
    s[2] = s10;
    s[3] = s11;
}
