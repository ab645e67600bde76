/* Two operands over up to four axes, each with its own steps (0 where it is broadcast); y is dense and may be an operand
 * that is not broadcast. */
typedef struct {
    int32_t size[4], step_a[4], step_b[4];
    int32_t a_signed, b_signed;
    float factor_a, factor_b, lo, hi;
} fq_pair;
