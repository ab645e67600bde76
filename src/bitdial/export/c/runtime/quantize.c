/* float32, channels first -> 8 bits, channels last */
static void fq_quantize(const fq_float *x, uint8_t *y, int32_t pixels, int32_t channels, float factor, float lo, float hi) {
    for (int32_t p = 0; p < pixels; ++p) {
        for (int32_t c = 0; c < channels; ++c) *y++ = fq_round(x[c * pixels + p] * factor, lo, hi);
    }
}
