static void fq_copy_float(const fq_float *x, fq_float *y, int32_t n) {
    for (int32_t i = 0; i < n; ++i) y[i] = x[i];
}
