// The inner loops for processors with avx512 and its products in bf16.
// SPDX-License-Identifier: Apache-2.0
#include "tiles.h"

#ifdef HAS_AVX512_BF16
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#include <immintrin.h>

namespace {

struct Values {
    alignas(64) uint16_t of[128];  // e4m3 without its sign, as bf16
};

constexpr Values values() {
    Values all = {};
    for (int code = 1; code < 128; code++) {
        int exponent = code >> 3, significand = code & 7;
        if (exponent)
            significand += 8;
        else
            exponent = 1;
        for (; significand < 8; exponent--) significand *= 2;
        all.of[code] = uint16_t((exponent - 7 + 127) << 7 | (significand - 8) << 4);
    }
    return all;
}

constexpr Values VALUES = values();

#define INLINE static inline __attribute__((always_inline))

INLINE __m512i pairs_of_codes(__m256i packed) {
    const __m512i codes = _mm512_cvtepu8_epi16(packed);
    const __m512i* const table = (const __m512i*)VALUES.of;
    const __m512i small = _mm512_permutex2var_epi16(table[0], codes, table[1]);
    const __m512i large = _mm512_permutex2var_epi16(table[2], codes, table[3]);
    const __m512i sizes = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(64)), small, large);
    const __m512i signs = _mm512_slli_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0x80)), 8);
    return _mm512_or_si512(sizes, signs);
}

INLINE __m512i pairs_of_codes(const uint8_t* from) { return pairs_of_codes(_mm256_loadu_si256((const __m256i*)from)); }

// `count` numbers, fewer than 32, and zeros after them; memory behind them is not read.
INLINE __m512i first_numbers(const uint16_t* from, long count) {
    return _mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), from);
}

INLINE __m512i first_numbers(const uint8_t* from, long count) {
    return pairs_of_codes(_mm256_maskz_loadu_epi8(__mmask32((1u << count) - 1), from));
}

#undef INLINE

}  // namespace

#define LANES 16
#define ROWS 4
#define TILES AVX512_BF16_TILES
#define TILES_NAME "avx512_bf16"
#define floats_of_halves(halves) ((Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)(halves)))
#define add_products(total, x, w) ((Floats)_mm512_dpbf16_ps((__m512)(total), (__m512bh)(x), (__m512bh)(w)))
#define pairs_of_floats(low, high) ((Words)_mm512_cvtne2ps_pbh((__m512)(high), (__m512)(low)))
#define first_pairs_of(from, count) ((Words)first_numbers(from, count))
#include "tiles.inc"
#endif
