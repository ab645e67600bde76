static void fq_mul(const uint8_t *a, const uint8_t *b, uint8_t *y, const fq_pair *p) {
    for (int32_t i = 0; i < p->size[0]; ++i) {
        for (int32_t j = 0; j < p->size[1]; ++j) {
            for (int32_t k = 0; k < p->size[2]; ++k) {
                const uint8_t *u = a + i * p->step_a[0] + j * p->step_a[1] + k * p->step_a[2];
                const uint8_t *v = b + i * p->step_b[0] + j * p->step_b[1] + k * p->step_b[2];
                for (int32_t l = 0; l < p->size[3]; ++l) {
                    const int32_t product =
                        fq_value(u[l * p->step_a[3]], p->a_signed) * fq_value(v[l * p->step_b[3]], p->b_signed);
                    *y++ = fq_round((float)product * p->factor_a, p->lo, p->hi);
                }
            }
        }
    }
}
