// Words of 512-bit registers, in terms of AVX-512 F, BW, DQ and VL; the sets that have them say in files of their own how they
// multiply. Everything static: no function here may be shared with code for another instruction set.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace bitdial {
namespace BITDIAL_ISA {

typedef __m512i vi;  // 16 x int32, or 64 bytes
typedef __m512 vf;
typedef __mmask16 Mask;  // of lanes

enum { LANES = 16, BYTES = 64 };

BITDIAL_INLINE vi zero() { return _mm512_setzero_si512(); }
BITDIAL_INLINE vi load(const void* p) { return _mm512_loadu_si512(p); }
BITDIAL_INLINE void store(void* p, vi a) { _mm512_storeu_si512(p, a); }
BITDIAL_INLINE vi broadcast4(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
BITDIAL_INLINE vi set(int32_t v) { return _mm512_set1_epi32(v); }
BITDIAL_INLINE vi set_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
BITDIAL_INLINE vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
BITDIAL_INLINE vi sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
BITDIAL_INLINE vi add_bytes(vi a, vi b) { return _mm512_add_epi8(a, b); }
BITDIAL_INLINE vi sub_bytes(vi a, vi b) { return _mm512_sub_epi8(a, b); }
BITDIAL_INLINE vi larger_bytes(vi a, vi b) { return _mm512_max_epu8(a, b); }
BITDIAL_INLINE vi smaller_bytes(vi a, vi b) { return _mm512_min_epu8(a, b); }
BITDIAL_INLINE vi larger(vi a, vi b) { return _mm512_max_epi32(a, b); }
BITDIAL_INLINE vi smaller(vi a, vi b) { return _mm512_min_epi32(a, b); }
BITDIAL_INLINE vi shift_left(vi a, int s) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(s)); }
BITDIAL_INLINE vi shift_left_each(vi a, vi s) { return _mm512_sllv_epi32(a, s); }
BITDIAL_INLINE vi shift_right_2(vi a) { return _mm512_srai_epi32(a, 2); }
BITDIAL_INLINE vi both(vi a, vi b) { return _mm512_and_si512(a, b); }
BITDIAL_INLINE vi swap_fours(vi a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xB1)); }
static inline int32_t sum(vi a) { return _mm512_reduce_add_epi32(a); }

BITDIAL_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
BITDIAL_INLINE vi round_even(vf a) { return _mm512_cvtps_epi32(a); }
BITDIAL_INLINE vf set(float v) { return _mm512_set1_ps(v); }
BITDIAL_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
BITDIAL_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
BITDIAL_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
BITDIAL_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
BITDIAL_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
BITDIAL_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
BITDIAL_INLINE vf clamp(vf a, vf lo, vf hi) { return _mm512_min_ps(_mm512_max_ps(a, lo), hi); }
// The instructions give their second operand where one is NaN and where both are zeros.
BITDIAL_INLINE vf bound(vf a, vf lo, vf hi) { return _mm512_min_ps(hi, _mm512_max_ps(lo, a)); }

BITDIAL_INLINE __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1u); }
BITDIAL_INLINE __mmask64 first_bytes(int n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }
BITDIAL_INLINE vi load(const uint8_t* p, int n) { return _mm512_maskz_loadu_epi8(first_bytes(n), p); }
BITDIAL_INLINE void store(uint8_t* p, vi a, int n) { _mm512_mask_storeu_epi8(p, first_bytes(n), a); }
// n <= 16 values of one byte each.
static inline vi load_bytes_wide(const uint8_t* p, int n) {
    return _mm512_cvtepu8_epi32(n >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                        : _mm_maskz_loadu_epi8(first(n), p));
}
static inline void store_bytes(uint8_t* p, vi a, int n) {
    if (n >= 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
    else
        _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(a));
}
BITDIAL_INLINE Mask part(int n, int k) { return static_cast<__mmask16>((first_bytes(n) >> (16 * k)) & 0xffff); }
BITDIAL_INLINE vi load(const int32_t* p, Mask some) { return _mm512_maskz_loadu_epi32(some, p); }
BITDIAL_INLINE void store(int32_t* p, vi a, Mask some) { _mm512_mask_storeu_epi32(p, some, a); }
BITDIAL_INLINE void store(float* p, vf a, Mask some) { _mm512_mask_storeu_ps(p, some, a); }
BITDIAL_INLINE vf load(const float* p, Mask some) { return _mm512_maskz_loadu_ps(some, p); }

// Of softmax.
BITDIAL_INLINE vf larger(vf a, vf b) { return _mm512_max_ps(a, b); }
BITDIAL_INLINE vi bits_of(vf a) { return _mm512_castps_si512(a); }
BITDIAL_INLINE vf float_of(vi a) { return _mm512_castsi512_ps(a); }
BITDIAL_INLINE vf zero_below(vf a, vf x, vf limit_) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit_, _CMP_GE_OQ), a); }
BITDIAL_INLINE vf first_or(vf a, Mask some, vf other) { return _mm512_mask_blend_ps(some, other, a); }
BITDIAL_INLINE float max_lanes(vf a) { return _mm512_reduce_max_ps(a); }
// Halves are added until one number is left.
BITDIAL_INLINE float total(const vf (&a)[1]) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a[0]), _mm512_extractf32x8_ps(a[0], 1));
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}

// The first n <= 16 N numbers of N vectors, limited to 0..255 (SIGNED: to -127..127, plus 128) and stored as adjacent bytes.
template <int N, bool SIGNED>
static inline void store_packed(uint8_t* p, const vi* q, int n) {
    static_assert(N >= 1 && N <= 4, "one to four vectors");
    const vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const vi low = _mm512_packs_epi32(q[0], q[N > 1]);
    const vi high = N > 2 ? _mm512_packs_epi32(q[N / 2 + (N == 3)], q[N - 1]) : low;
    vi bytes = SIGNED ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    if (SIGNED) bytes = _mm512_xor_si512(_mm512_max_epi8(bytes, set_bytes(-127)), set_bytes(128));
    bytes = _mm512_permutexvar_epi32(order, bytes);
    if (n < 16 * N)
        _mm512_mask_storeu_epi8(p, (1ull << n) - 1ull, bytes);
    else if (N == 4)
        store(p, bytes);
    else if (N == 1)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(bytes));
    else
        _mm512_mask_storeu_epi8(p, (1ull << (16 * N % 64)) - 1ull, bytes);
}

// clamp(rne(v / 2^s), lo, hi) in every int32 lane; shift = s + 1 and half = 2^s - 1.
BITDIAL_INLINE vi extract(vi v, vi shift, vi half, vi lo, vi hi) {
    const vi twice = _mm512_add_epi32(v, v);
    const vi odd = _mm512_and_si512(_mm512_srav_epi32(twice, shift), _mm512_set1_epi32(1));
    const vi q = _mm512_srav_epi32(_mm512_add_epi32(_mm512_add_epi32(twice, half), odd), shift);
    return smaller(larger(q, lo), hi);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
