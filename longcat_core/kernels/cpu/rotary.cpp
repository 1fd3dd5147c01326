// Rotary embedding of interleaved pairs, in place.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "kernels.h"
#include "parallel.h"

using namespace longcat;

static void rotate(bf16* x, const float* cos, const float* sin, long pairs) {
    for (long i = 0; i < pairs; i++) {
        const float even = to_float(x[2 * i]), odd = to_float(x[2 * i + 1]);
        x[2 * i] = to_bf16(even * cos[i] - odd * sin[i]);
        x[2 * i + 1] = to_bf16(odd * cos[i] + even * sin[i]);
    }
}

extern "C" {

// x: bf16 [tokens, heads, 2 pairs], tokens x_stride and heads head_stride apart; cos and sin: fp32 [tokens, pairs].
void longcat_rotate(bf16* x, long x_stride, long head_stride, const float* cos, const float* sin, long tokens, long heads,
                    long pairs) {
    const long at_once = std::max(1L, WORTH_A_THREAD / (2 * pairs * heads)), blocks = (tokens + at_once - 1) / at_once;
    for_each(blocks, [=](long block) {
        for (long t = block * at_once; t < std::min(tokens, (block + 1) * at_once); t++)
            for (long h = 0; h < heads; h++)
                rotate(x + t * x_stride + h * head_stride, cos + t * pairs, sin + t * pairs, pairs);
    });
}
}
