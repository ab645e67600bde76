/* Inner products by what the target has. -DBITDIAL_PLAIN asks for plain C.
 *   FQ_BYTES  operands as int8, 16 products an instruction (AArch64 dot product, Helium); unsigned activations are stored
 *             minus 128, and 128 times the sum of a row is added back
 *   FQ_DSP    ARM's SIMD within 32-bit registers: operands as int16, two products an instruction, low groups of 4 bits four
 *   neither   operands as int16; AArch64 multiplies eight at once, elsewhere the compiler does as it likes */
#define FQ_BYTES 0
#define FQ_DSP 0
#define FQ_NEON 0
#if defined(BITDIAL_PLAIN) || defined(__ARM_BIG_ENDIAN) || !defined(__GNUC__)
/* plain */
#elif defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 1)
#include <arm_mve.h>
#undef FQ_BYTES
#define FQ_BYTES 1
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#undef FQ_BYTES
#define FQ_BYTES 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#undef FQ_NEON
#define FQ_NEON 1
#elif defined(__ARM_FEATURE_DSP) && defined(__arm__)
#undef FQ_DSP
#define FQ_DSP 1
#endif

#if FQ_BYTES
typedef int8_t fq_column; /* an activation as the inner loops read it */
#else
typedef int16_t FQ_MAY_ALIAS fq_column;
#endif

#if FQ_DSP
FQ_INLINE uint32_t fq_load4(const void *from) {
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    return word;
}
FQ_INLINE void fq_store4(void *to, uint32_t word) { __builtin_memcpy(to, &word, 4); }
#define FQ_UNARY(name, instruction)                        \
    FQ_INLINE uint32_t name(uint32_t x) {                  \
        uint32_t y;                                        \
        __asm__(instruction : "=r"(y) : "r"(x));           \
        return y;                                          \
    }
#define FQ_TERNARY(name, instruction)                                       \
    FQ_INLINE int32_t name(uint32_t x, uint32_t w, int32_t sum) {           \
        int32_t y;                                                          \
        __asm__(instruction : "=r"(y) : "r"(x), "r"(w), "r"(sum));          \
        return y;                                                           \
    }
FQ_UNARY(fq_sxtb16, "sxtb16 %0, %1")
FQ_UNARY(fq_sxtb16_ror8, "sxtb16 %0, %1, ror #8")
FQ_UNARY(fq_uxtb16, "uxtb16 %0, %1")
FQ_UNARY(fq_uxtb16_ror8, "uxtb16 %0, %1, ror #8")
FQ_TERNARY(fq_smlad, "smlad %0, %1, %2, %3")
FQ_TERNARY(fq_smlabb, "smlabb %0, %1, %2, %3")
FQ_TERNARY(fq_smlatt, "smlatt %0, %1, %2, %3")
FQ_INLINE uint32_t fq_smuad(uint32_t x, uint32_t w) {
    uint32_t y;
    __asm__("smuad %0, %1, %2" : "=r"(y) : "r"(x), "r"(w));
    return y;
}
#endif
