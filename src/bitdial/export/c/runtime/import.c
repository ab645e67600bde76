/* 8 bits, channels first -> channels last */
static void fq_import(const uint8_t *x, uint8_t *y, int32_t pixels, int32_t channels) {
    for (int32_t p = 0; p < pixels; ++p) {
        for (int32_t c = 0; c < channels; ++c) *y++ = x[c * pixels + p];
    }
}
