static void fq_zero(uint8_t *y, int32_t n) {
    for (int32_t i = 0; i < n; ++i) y[i] = 0;
}
