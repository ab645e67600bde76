/* y[i] = x[from[i]], or 0 where from[i] is negative */
static void fq_move(const uint8_t *x, uint8_t *y, int32_t n, const int32_t *from) {
    for (int32_t i = 0; i < n; ++i) y[i] = from[i] < 0 ? 0 : x[from[i]];
}
