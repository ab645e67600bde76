// The 8-bit product in its split form (see SplitRun in conv_args.h). Included inside a namespace by conv_body.h where
// BITDIAL_SPLIT says that the set gains from it.

// a[i][j] += dot products of pixel i with the outputs of vector j, over all runs of one block.
template <int R, int NC>
BITDIAL_INLINE void split_sums(vi (&a)[R][NC], const uint8_t* const* in, const ConvArgs& c,
                                                             const SplitRun* runs) {
    const uint8_t* q[R];
    _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) q[i] = in[i];
    for (int32_t r = 0; r < c.split_runs; r++) {
        const int32_t* place = c.split_places + runs[r].places;
        const int8_t* w = c.high_weights + runs[r].weights;
        for (const int32_t* end = place + runs[r].pairs; place < end; place++, w += 4 * BLOCK) {
            const int64_t o = *place;
            vi b[NC];
            _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) b[j] = load(w + 4 * LANES * j);
            _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) {
                const vi x = broadcast4(q[i] + o);
                _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) a[i][j] = dot_pairs(a[i][j], x, b[j]);
            }
        }
        for (const int32_t* end = place + runs[r].wide; place < end; place++, w += 8 * BLOCK) {
            const int64_t o = *place;
            vi even[NC], odd[NC];
            _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) {
                even[j] = load(w + 4 * LANES * j);
                odd[j] = load(w + 4 * LANES * (COLS + j));
            }
            _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) {
                const vi x = broadcast4(q[i] + o);
                _Pragma("GCC unroll 8") for (int j = 0; j < NC; j++) a[i][j] = dot_wide(a[i][j], x, even[j], odd[j]);
            }
        }
    }
}

template <int R, int NC>
static __attribute__((noinline)) void split_tile(const ConvArgs& c, const SplitRun* runs, const uint8_t* const* in,
                                                 const int32_t* init, int32_t* sums, int32_t k, const Pixel* pixels) {
    vi a[R][NC];
    begin_tile<true>(c, a, sums, k);
    split_sums<R, NC>(a, in, c, runs);
    end_tile<true>(c, a, init, sums, k, pixels);
}

static inline void split_rows(int rows, int32_t outputs, const ConvArgs& c, const SplitRun* runs, const uint8_t* const* in,
                              const int32_t* init, int32_t* sums, int32_t k, const Pixel* pixels) {
    with_count<COLS>((outputs + LANES - 1) / LANES, [&](auto n) BITDIAL_ALWAYS_INLINE {
        with_count<ROWS>(rows, [&](auto r) BITDIAL_ALWAYS_INLINE {
            split_tile<decltype(r)::value, decltype(n)::value>(c, runs, in, init, sums, k, pixels);
        });
    });
}
