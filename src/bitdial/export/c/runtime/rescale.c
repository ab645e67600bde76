/* One input of a concatenation: `outer` runs of `inner` bytes, written `pitch` apart. */
static void fq_rescale(const uint8_t *x, uint8_t *y, int32_t outer, int32_t inner, int32_t pitch, float factor,
                       int32_t is_signed, float lo, float hi) {
    for (int32_t i = 0; i < outer; ++i) {
        for (int32_t j = 0; j < inner; ++j) y[j] = fq_round((float)fq_value(*x++, is_signed) * factor, lo, hi);
        y += pitch;
    }
}
