// The inner loops for processors with avx512.
// SPDX-License-Identifier: Apache-2.0
#include "tiles.h"

#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>
#define LANES 16
#define ROWS 4
#define TILES AVX512_TILES
#define TILES_NAME "avx512"
#define floats_of_halves(halves) ((Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)(halves)))
#include "tiles.inc"
#endif
