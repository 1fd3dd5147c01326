// The inner loops for any processor, in registers of 128 bits.
// SPDX-License-Identifier: Apache-2.0
#include "tiles.h"

#define LANES 4
#define ROWS 2
#define TILES GENERIC_TILES
#define TILES_NAME "generic"
#include "tiles.inc"
