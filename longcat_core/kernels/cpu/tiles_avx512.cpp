// The inner loops for processors with avx512.
// SPDX-License-Identifier: Apache-2.0
#include "tiles.h"

#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define LANES 16
#define ROWS 4
#define TILES AVX512_TILES
#define TILES_NAME "avx512"
#include "tiles.inc"
#endif
