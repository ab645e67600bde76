/* Channels of the input that are low together. Rows of weights hold the groups one after another, each as
 * [kernel_h][kernel_w][width], filled up with zeros to a multiple of four. */
typedef struct {
    int32_t first, width;  /* channels, counted inside the convolution group */
    int32_t offset, length; /* of the run in a row; the length without filling */
    const uint8_t *lower;  /* [256] stored byte -> stored byte of what low precision makes of it */
    int32_t shift;         /* of the activations */
#if FQ_STORED
    int32_t low_offset;    /* of the run in a row of stored low weights */
#endif
} fq_group;

typedef struct {
    const int8_t *weight;      /* [outputs][row], or packed rows */
    const int32_t *bias;       /* [ratios][outputs] */
    const float *multiplier;   /* [outputs] */
    const fq_group *groups;    /* [conv_groups * groups_per] */
    const uint8_t *weight_shift; /* [outputs / shift_rows, rounded up][groups_per] */
    const int8_t *lower_weight; /* [shift][256] stored byte -> low value */
#if FQ_STORED
    const int8_t *low_weight;  /* [outputs][low_row] low weights that are stored: bytes, or two values + 8 in one; or 0 */
    int32_t low_row, low_nibbles;
#endif
    const uint8_t *low;        /* [ratios][conv_groups * groups_per], 1: the group is low; 0 if none ever is */
    int32_t row, stored_row;   /* bytes of a row as the inner loops read it, and as it is stored */
    int32_t makes, block;      /* 1: rows with low groups are made in scratch memory, `block` at a time */
    int32_t fours;             /* 1: low groups fit the form of four products an instruction */
    int32_t shift_rows;
    int32_t in_h, in_w, channels, out_h, out_w, outputs;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int32_t conv_groups, groups_per;
    int32_t in_signed, residual_signed, limits; /* limits of a float output: 1 lo, 2 hi */
    float residual_factor, lo, hi;
} fq_layer;

/* Where a layer reads and writes: either y or y_float, at most one residual. */
typedef struct {
    const uint8_t *x;
    uint8_t *y;
    fq_float *y_float;
    const uint8_t *residual;
    const fq_float *residual_float;
    int32_t pixel_step, channel_step; /* of the float tensors */
    uint8_t *scratch;
} fq_places;

/* Bias, multiplier, residual, limits, rounding of one accumulator. */
FQ_INLINE void fq_finish(const fq_layer *l, const fq_places *p, const int32_t *bias, int32_t pixel, int32_t o, int32_t acc) {
    float t = (float)(acc + bias[o]) * l->multiplier[o];
    if (p->y_float) {
        const int32_t at = pixel * p->pixel_step + o * p->channel_step;
        if (p->residual_float) t = FQ_ROUNDED(t) + p->residual_float[at];
        if ((l->limits & 1) && t < l->lo) t = l->lo;
        if ((l->limits & 2) && t > l->hi) t = l->hi;
        p->y_float[at] = t;
    } else {
        const int32_t at = pixel * l->outputs + o;
        if (p->residual) {
            const float r = (float)fq_value(p->residual[at], l->residual_signed) * l->residual_factor;
            t = FQ_ROUNDED(t) + FQ_ROUNDED(r);
        }
        p->y[at] = fq_round(t, l->lo, l->hi);
    }
}
