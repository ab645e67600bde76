#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16: half precision stays half, float is float */
#error "float arithmetic must be evaluated in float (x86: -mfpmath=sse), or results differ from the other engines"
#endif
#if defined(__FAST_MATH__)
#error "-ffast-math changes results; build without it"
#endif

/* Products must be rounded before they are added. Clang obeys the pragma, GCC keeps them apart under -std=c99 (with
 * -std=gnu99 it does not); elsewhere the product goes through memory. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#define FQ_ROUNDED(x) (x)
#elif defined(__GNUC__) && defined(__STRICT_ANSI__)
#define FQ_ROUNDED(x) (x)
#else
#define FQ_ROUNDED(x) fq_rounded(x)
static inline float fq_rounded(float x) {
    volatile float kept = x;
    return kept;
}
#endif

#if defined(__GNUC__)
#define FQ_MAY_ALIAS __attribute__((may_alias))
#define FQ_ALIGNED __attribute__((aligned(16)))
#define FQ_INLINE static inline __attribute__((always_inline, unused))
#define FQ_KERNEL static __attribute__((noinline))
#else
#define FQ_MAY_ALIAS
#define FQ_ALIGNED
#define FQ_INLINE static inline
#define FQ_KERNEL static
#endif

typedef float FQ_MAY_ALIAS fq_float; /* what lies in the arena */
typedef int32_t FQ_MAY_ALIAS fq_int;

/* The integer that a stored byte means. */
FQ_INLINE int32_t fq_value(uint8_t byte, int32_t is_signed) { return is_signed ? (int32_t)(int8_t)byte : (int32_t)byte; }

/* Clamp, round half to even, as a stored byte: adding 1.5 * 2^23 leaves the integer in the low bits. NaN gives lo. */
FQ_INLINE uint8_t fq_round(float t, float lo, float hi) {
    union {
        float f;
        uint32_t u;
    } bits;
    t = t > lo ? t : lo;
    t = t < hi ? t : hi;
    bits.f = t + 12582912.0f;
    return (uint8_t)(bits.u & 0xFFu);
}
