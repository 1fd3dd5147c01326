// x W^T for a dense projection, and the choice of the instruction set.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace longcat {

static const Tiles* const ALL_TILES[] = {  // the quickest first
#ifdef HAS_AVX512_BF16
    &AVX512_BF16_TILES,
#endif
#ifdef __x86_64__
    &AVX512_TILES, &AVX2_TILES,
#endif
    &GENERIC_TILES};

static bool is_supported(const Tiles& some) {
#ifdef __x86_64__
#ifdef HAS_AVX512_BF16
    if (&some == &AVX512_BF16_TILES) return is_supported(AVX512_TILES) && __builtin_cpu_supports("avx512bf16");
#endif
    if (&some == &AVX512_TILES)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (&some == &AVX2_TILES) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &some == &GENERIC_TILES;
}

static const Tiles* quickest() {
    for (const Tiles* some : ALL_TILES)
        if (is_supported(*some)) return some;
    return &GENERIC_TILES;
}

static const Tiles* chosen = quickest();

const Tiles& tiles() { return *chosen; }

}  // namespace longcat

using namespace longcat;

static constexpr long BLOCK = 32;    // rows of weight, which stay in the second-level cache for all tokens
static constexpr long AT_ONCE = 64;  // tokens

template <class X, class W>
static void multiply(bf16* output, Rows<X> x, Weight<W> weight, long tokens, long rows, long k) {
    const Tiles& tile = tiles();
    for_each((rows + BLOCK - 1) / BLOCK, [=, &tile](long item) {
        const long first = item * BLOCK, count = std::min(BLOCK, rows - first);
        float sums[AT_ONCE * BLOCK];
        for (long t = 0; t < tokens; t += AT_ONCE) {
            const long some = std::min(AT_ONCE, tokens - t);
            dot(tile, {x(t), x.stride, nullptr}, some, weight, first, count, k, sums, BLOCK);
            for (long i = 0; i < some; i++)
                for (long n = 0; n < count; n++) output[(t + i) * rows + first + n] = to_bf16(sums[i * BLOCK + n]);
        }
    });
}

template <class W>
static void multiply(bf16* output, const bf16* x, long x_stride, Weight<W> weight, float* scratch, long tokens, long rows,
                     long k) {
    const Tiles& tile = tiles();
    if (tile.dot_bf16) return multiply(output, Rows<bf16>{x, x_stride, nullptr}, weight, tokens, rows, k);
    const long width = padded(k);
    for_each(tokens, [=, &tile](long t) { tile.split(x + t * x_stride, k, scratch + t * width); });
    multiply(output, Rows<float>{scratch, width, nullptr}, weight, tokens, rows, k);
}

extern "C" {

const char* longcat_instruction_set() { return tiles().name; }

// 1, or 0 if there is no such instruction set or the processor does not have it; then nothing changes.
int longcat_use(const char* name) {
    for (const Tiles* some : ALL_TILES)
        if (std::strcmp(some->name, name) == 0 && is_supported(*some)) {
            chosen = some;
            return 1;
        }
    return 0;
}

// output: bf16 [tokens, rows]; x: bf16 [tokens, k], rows x_stride apart; weight: [rows, k], rows weight_stride apart, in
// bf16, or in FP8 if there are scales: fp32 [ceil(rows / SCALED), ceil(k / SCALED)]; scratch: fp32 [tokens, padded(k)], of which a processor with products
// in bf16 needs none.
void longcat_product(bf16* output, const bf16* x, long x_stride, const void* weight, long weight_stride,
                     const float* scales, float* scratch, long tokens, long rows, long k) {
    if (scales)
        multiply(output, x, x_stride, as_fp8(weight, weight_stride, scales, k), scratch, tokens, rows, k);
    else
        multiply(output, x, x_stride, as_bf16(weight, weight_stride), scratch, tokens, rows, k);
}
}
