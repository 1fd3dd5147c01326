// The inner loops for processors with avx2.
// SPDX-License-Identifier: Apache-2.0
#include "tiles.h"

#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define LANES 8
#define ROWS 2
#define TILES AVX2_TILES
#define TILES_NAME "avx2"
#include "tiles.inc"
#endif
