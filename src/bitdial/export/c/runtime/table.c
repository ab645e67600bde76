/* y = table[x], both as stored bytes; x and y may be one */
static void fq_table(const uint8_t *x, uint8_t *y, int32_t n, const uint8_t *table) {
    for (int32_t i = 0; i < n; ++i) y[i] = table[x[i]];
}
