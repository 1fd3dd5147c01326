// The inner loops for processors with avx2.
// SPDX-License-Identifier: Apache-2.0
#include "tiles.h"

#ifdef __x86_64__
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#define LANES 8
#define ROWS 2
#define TILES AVX2_TILES
#define TILES_NAME "avx2"
#define floats_of_halves(halves) ((Floats)_mm256_cvtph_ps((__m128i)(halves)))
#include "tiles.inc"
#endif
