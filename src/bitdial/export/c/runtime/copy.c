/* A movement as nested loops: size, step in x and step in y per axis. */
typedef struct {
    int32_t size[5], step_x[5], step_y[5];
} fq_loops;

static void fq_copy(const uint8_t *x, uint8_t *y, const fq_loops *l) {
    int32_t at[4];
    for (at[0] = 0; at[0] < l->size[0]; ++at[0]) {
        for (at[1] = 0; at[1] < l->size[1]; ++at[1]) {
            for (at[2] = 0; at[2] < l->size[2]; ++at[2]) {
                for (at[3] = 0; at[3] < l->size[3]; ++at[3]) {
                    int32_t from = 0, to = 0;
                    for (int32_t axis = 0; axis < 4; ++axis) {
                        from += at[axis] * l->step_x[axis];
                        to += at[axis] * l->step_y[axis];
                    }
                    for (int32_t i = 0; i < l->size[4]; ++i) y[to + i * l->step_y[4]] = x[from + i * l->step_x[4]];
                }
            }
        }
    }
}
