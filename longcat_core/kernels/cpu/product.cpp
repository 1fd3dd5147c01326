// x W^T for a dense projection, and the choice of the instruction set.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

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

// store(t, first, count, sums), with the products of token t with `count` rows of the weight, for each token and each block
// of the weight's rows.
template <class X, class W, class Store>
static void multiply(Rows<X> x, Weight<W> weight, long tokens, long rows, long k, Store store) {
    const Tiles& tile = tiles();
    for_each((rows + BLOCK - 1) / BLOCK, [=, &tile](long item) {
        const long first = item * BLOCK, count = std::min(BLOCK, rows - first);
        float sums[AT_ONCE * BLOCK];
        for (long t = 0; t < tokens; t += AT_ONCE) {
            const long some = std::min(AT_ONCE, tokens - t);
            dot(tile, {x(t), x.stride, nullptr}, some, weight, first, count, k, sums, BLOCK);
            for (long i = 0; i < some; i++) store(t + i, first, count, sums + i * BLOCK);
        }
    });
}

template <class W, class Store>
static void multiply(const bf16* x, long x_stride, Weight<W> weight, float* scratch, long tokens, long rows, long k,
                     Store store) {
    const Tiles& tile = tiles();
    if (tile.dot_bf16) return multiply(Rows<bf16>{x, x_stride, nullptr}, weight, tokens, rows, k, store);
    const long width = padded(k);
    for_each(tokens, [=, &tile](long t) { tile.split(x + t * x_stride, k, scratch + t * width); });
    multiply(Rows<float>{scratch, width, nullptr}, weight, tokens, rows, k, store);
}

namespace {
struct Best {
    float value;  // as bf16 has it
    long row;
};
}  // namespace

// The first of the greatest; the first of all if none is a number.
static Best best_of(const float* sums, long first, long count) {
    float greatest = -INFINITY;
    for (long n = 0; n < count; n++) greatest = sums[n] > greatest ? sums[n] : greatest;
    const bf16 rounded = to_bf16(greatest);
    long n = 0;
    while (n < count && to_bf16(sums[n]) != rounded) n++;
    return {to_float(rounded), first + n % count};
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
    const auto store = [=](long t, long first, long count, const float* sums) {
        for (long n = 0; n < count; n++) output[t * rows + first + n] = to_bf16(sums[n]);
    };
    if (scales)
        multiply(x, x_stride, as_fp8(weight, weight_stride, scales, k), scratch, tokens, rows, k, store);
    else
        multiply(x, x_stride, as_bf16(weight, weight_stride), scratch, tokens, rows, k, store);
}

// chosen: int64 [tokens], the first row of the greatest product, rounded to bf16, with each token; the rest as of
// `longcat_product`; weight: bf16, contiguous.
void longcat_choose(int64_t* chosen, const bf16* x, long x_stride, const bf16* weight, float* scratch, long tokens, long rows,
                    long k) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
    const std::unique_ptr<Best[]> found(new Best[tokens * blocks]);
    Best* const of_blocks = found.get();
    multiply(x, x_stride, as_bf16(weight, k), scratch, tokens, rows, k,
             [=](long t, long first, long count, const float* sums) {
                 of_blocks[t * blocks + first / BLOCK] = best_of(sums, first, count);
             });
    for (long t = 0; t < tokens; t++) {
        const Best* const of_token = of_blocks + t * blocks;
        chosen[t] = std::max_element(of_token, of_token + blocks, [](Best a, Best b) { return a.value < b.value; })->row;
    }
}
}
