// Words of 256-bit registers, in terms of AVX2; the sets that have them say in files of their own how they multiply.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define BITDIAL_BLOCKS "ymm_blocks.h"

namespace bitdial {
namespace BITDIAL_ISA {

typedef __m256i vi;
typedef __m256 vf;
typedef __m256i Mask;  // of lanes

enum { LANES = 8, BYTES = 32 };

BITDIAL_INLINE vi zero() { return _mm256_setzero_si256(); }
BITDIAL_INLINE vi load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
BITDIAL_INLINE void store(void* p, vi a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
BITDIAL_INLINE vi broadcast4(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}
BITDIAL_INLINE vi set(int32_t v) { return _mm256_set1_epi32(v); }
BITDIAL_INLINE vi set_bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
BITDIAL_INLINE vi add(vi a, vi b) { return _mm256_add_epi32(a, b); }
BITDIAL_INLINE vi sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
BITDIAL_INLINE vi add_bytes(vi a, vi b) { return _mm256_add_epi8(a, b); }
BITDIAL_INLINE vi sub_bytes(vi a, vi b) { return _mm256_sub_epi8(a, b); }
BITDIAL_INLINE vi larger_bytes(vi a, vi b) { return _mm256_max_epu8(a, b); }
BITDIAL_INLINE vi smaller_bytes(vi a, vi b) { return _mm256_min_epu8(a, b); }
BITDIAL_INLINE vi larger(vi a, vi b) { return _mm256_max_epi32(a, b); }
BITDIAL_INLINE vi smaller(vi a, vi b) { return _mm256_min_epi32(a, b); }
BITDIAL_INLINE vi shift_left(vi a, int s) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(s)); }
BITDIAL_INLINE vi shift_left_each(vi a, vi s) { return _mm256_sllv_epi32(a, s); }
BITDIAL_INLINE vi shift_right_2(vi a) { return _mm256_srai_epi32(a, 2); }
BITDIAL_INLINE vi both(vi a, vi b) { return _mm256_and_si256(a, b); }
BITDIAL_INLINE vi swap_fours(vi a) { return _mm256_shuffle_epi32(a, 0xB1); }
static inline int32_t sum(vi a) {
    alignas(32) int32_t v[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(v), a);
    uint32_t total = 0;
    for (int i = 0; i < 8; i++) total += static_cast<uint32_t>(v[i]);
    return static_cast<int32_t>(total);
}

BITDIAL_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
BITDIAL_INLINE vi round_even(vf a) { return _mm256_cvtps_epi32(a); }
BITDIAL_INLINE vf set(float v) { return _mm256_set1_ps(v); }
BITDIAL_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
BITDIAL_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
BITDIAL_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
BITDIAL_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
BITDIAL_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
BITDIAL_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
BITDIAL_INLINE vf clamp(vf a, vf lo, vf hi) { return _mm256_min_ps(_mm256_max_ps(a, lo), hi); }
// The instructions give their second operand where one is NaN and where both are zeros.
BITDIAL_INLINE vf bound(vf a, vf lo, vf hi) { return _mm256_min_ps(hi, _mm256_max_ps(lo, a)); }

BITDIAL_INLINE vi first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline void store_bytes(uint8_t* p, vi a, int n) {
    const vi low = _mm256_shuffle_epi8(a, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12,
                                                           -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const uint64_t v = static_cast<uint32_t>(_mm256_extract_epi32(low, 0)) |
                       static_cast<uint64_t>(static_cast<uint32_t>(_mm256_extract_epi32(low, 4))) << 32;
    if (n >= 8)
        __builtin_memcpy(p, &v, 8);
    else
        for (int i = 0; i < n; i++) p[i] = static_cast<uint8_t>(v >> (8 * i));
}
// The first `count` < 8 bytes as the low bytes of an integer.
BITDIAL_INLINE uint64_t load_few(const uint8_t* from, int32_t count) {
    uint64_t r = 0;
    if (count >= 4) {
        uint32_t low, high;
        __builtin_memcpy(&low, from, 4);
        __builtin_memcpy(&high, from + count - 4, 4);
        r = low | (static_cast<uint64_t>(high) << (8 * (count - 4)));
    } else if (count > 0) {
        r = from[0] | (static_cast<uint64_t>(from[count / 2]) << (8 * (count / 2))) |
            (static_cast<uint64_t>(from[count - 1]) << (8 * (count - 1)));
    }
    return r;
}

static inline vi load_bytes_wide(const uint8_t* p, int n) {
    uint64_t v;
    if (n >= 8)
        __builtin_memcpy(&v, p, 8);
    else
        v = load_few(p, n);
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(v)));
}
BITDIAL_INLINE __m128i load_half(const uint8_t* from, int32_t count) {
    if (count >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (count < 8) return _mm_set_epi64x(0, static_cast<int64_t>(load_few(from, count)));
    uint64_t low;
    __builtin_memcpy(&low, from, 8);
    return _mm_set_epi64x(static_cast<int64_t>(load_few(from + 8, count - 8)), static_cast<int64_t>(low));
}

// A function of its own: kernels have hundreds of such loads, which take minutes to compile where all are inline.
static __attribute__((noinline, unused)) vi load_part(const uint8_t* from, int32_t count) {
    const __m128i low = load_half(from, count);
    const __m128i high = count > 16 ? load_half(from + 16, count - 16) : _mm_setzero_si128();
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

BITDIAL_INLINE vi load(const uint8_t* from, int32_t count) { return count >= 32 ? load(from) : load_part(from, count); }

BITDIAL_INLINE void store_half(uint8_t* to, __m128i half, int32_t count) {
    if (count >= 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
        return;
    }
    uint64_t word = static_cast<uint64_t>(_mm_cvtsi128_si64(half));
    if (count >= 8) {
        __builtin_memcpy(to, &word, 8);
        word = static_cast<uint64_t>(_mm_extract_epi64(half, 1));
        to += 8;
        count -= 8;
    }
    if (count >= 4) {
        __builtin_memcpy(to, &word, 4);
        word >>= 32;
        to += 4;
        count -= 4;
    }
    for (; count > 0; --count, word >>= 8) *to++ = static_cast<uint8_t>(word);
}

BITDIAL_INLINE void store(uint8_t* to, vi bytes, int32_t count) {
    store_half(to, _mm256_castsi256_si128(bytes), count);
    if (count > 16) store_half(to + 16, _mm256_extracti128_si256(bytes, 1), count - 16);
}

BITDIAL_INLINE Mask part(int n, int k) { return first(n - LANES * k); }
BITDIAL_INLINE vi load(const int32_t* p, Mask some) { return _mm256_maskload_epi32(p, some); }
BITDIAL_INLINE void store(int32_t* p, vi a, Mask some) { _mm256_maskstore_epi32(p, some, a); }
BITDIAL_INLINE void store(float* p, vf a, Mask some) { _mm256_maskstore_ps(p, some, a); }
BITDIAL_INLINE vf load(const float* p, Mask some) { return _mm256_maskload_ps(p, some); }

// Of softmax.
BITDIAL_INLINE vf larger(vf a, vf b) { return _mm256_max_ps(a, b); }
BITDIAL_INLINE vi bits_of(vf a) { return _mm256_castps_si256(a); }
BITDIAL_INLINE vf float_of(vi a) { return _mm256_castsi256_ps(a); }
BITDIAL_INLINE vf zero_below(vf a, vf x, vf limit_) { return _mm256_and_ps(a, _mm256_cmp_ps(x, limit_, _CMP_GE_OQ)); }
BITDIAL_INLINE vf first_or(vf a, Mask some, vf other) { return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(some)); }
BITDIAL_INLINE float max_lanes(vf a) {
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
// Halves of 16 lanes are added until one number is left.
BITDIAL_INLINE float total(const vf (&a)[2]) {
    const __m256 b = _mm256_add_ps(a[0], a[1]);
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}

// The first n <= 8 N numbers of N vectors, limited to 0..255 (SIGNED: to -127..127, plus 128) and stored as adjacent bytes.
template <int N, bool SIGNED>
static inline void store_packed(uint8_t* p, const vi* q, int n) {
    static_assert(N == 1 || N == 2, "one or two vectors");
    const vi words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[N - 1]), 0xD8);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    __m128i bytes = SIGNED ? _mm_packs_epi16(low, high) : _mm_packus_epi16(low, high);
    if (SIGNED) bytes = _mm_xor_si128(_mm_max_epi8(bytes, _mm_set1_epi8(-127)), _mm_set1_epi8(static_cast<char>(0x80)));
    store_half(p, bytes, n);
}

// clamp(rne(v / 2^s), lo, hi) in every int32 lane; shift = s + 1 and half = 2^s - 1.
BITDIAL_INLINE vi extract(vi v, vi shift, vi half, vi lo, vi hi) {
    const vi twice = _mm256_add_epi32(v, v);
    const vi odd = _mm256_and_si256(_mm256_srav_epi32(twice, shift), _mm256_set1_epi32(1));
    const vi q = _mm256_srav_epi32(_mm256_add_epi32(_mm256_add_epi32(twice, half), odd), shift);
    return smaller(larger(q, lo), hi);
}

}  // namespace BITDIAL_ISA
}  // namespace bitdial
