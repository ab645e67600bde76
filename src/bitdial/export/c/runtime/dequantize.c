/* 8 bits, channels last -> float32, channels first */
static void fq_dequantize(const uint8_t *x, fq_float *y, int32_t pixels, int32_t channels, float factor, int32_t is_signed) {
    for (int32_t p = 0; p < pixels; ++p) {
        for (int32_t c = 0; c < channels; ++c) y[c * pixels + p] = (float)fq_value(*x++, is_signed) * factor;
    }
}
