// All FFN experts of a layer for all tokens, each with the rows that chose it, in two passes over the weights.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

using namespace longcat;

static constexpr long BLOCK = 32;     // rows of a weight in a product
static constexpr long MANY = 48;      // rows of an expert from which on packing a weight's takes less time than it saves
static constexpr long AT_ONCE = 192, AT_ONCE_UNPACKED = 64;  // rows of an expert in a product
static constexpr long PAIRS = 512;    // of columns of a weight that are packed at once, and stay in a cache
static_assert(2 * BLOCK == SLOTS, "two blocks are packed beside each other");

namespace {
struct Part {  // an expert's rows, a few of them at a time, so that many rows are shared among threads
    long expert, first, count;
};
}  // namespace

// Of a matrix [rows, k] that follows others of its size.
static Weight<bf16> nth(Weight<bf16> first, long n, long rows) {
    return {first.data + n * rows * first.stride, first.stride, nullptr, 0};
}

static Weight<fp8> nth(Weight<fp8> first, long n, long rows) {
    return {first.data + n * rows * first.stride, first.stride,
            first.scales + n * ((rows + SCALED - 1) / SCALED) * first.scale_stride, first.scale_stride};
}

namespace {
template <class W>
struct Block {
    Weight<W> weight;
    long first, count;  // of its rows, at most BLOCK
};
}  // namespace

// out [tokens, 2 BLOCK]: products with rows of a weight, and beside them those with rows of another.
template <class X, class W>
static void dot_both(Rows<X> x, long tokens, Block<W> a, Block<W> b, long k, float* out) {
    dot(tiles(), x, tokens, a.weight, a.first, a.count, k, out, 2 * BLOCK);
    dot(tiles(), x, tokens, b.weight, b.first, b.count, k, out + BLOCK, 2 * BLOCK);
}

static void dot_both(Rows<bf16> x, long tokens, Block<bf16> a, Block<bf16> b, long k, float* out) {
    const Tiles& tile = tiles();
    if (!tile.pack || tokens < MANY || k % 2) return dot_both<bf16, bf16>(x, tokens, a, b, k, out);
    const std::unique_ptr<uint32_t[]> packed(new uint32_t[std::min(PAIRS, k / 2) * SLOTS]);
    std::fill_n(out, tokens * SLOTS, 0.0f);
    for (long first = 0; first < k; first += 2 * PAIRS) {
        const long pairs = std::min(PAIRS, (k - first) / 2);
        for (const Block<bf16>* each : {&a, &b}) {
            const Rows<bf16> rows = {each->weight.data + each->first * each->weight.stride + first, each->weight.stride, nullptr};
            tile.pack(rows, each->count, BLOCK, pairs, packed.get() + (each == &b ? BLOCK : 0));
        }
        tile.add_packed({x.data + first, x.stride, x.index}, tokens, packed.get(), pairs, out, SLOTS);
    }
}

// x: rows that a product takes; acted: [the rows of all experts, padded(inner)].
template <class X, class W>
static void all_experts(bf16* output, Rows<X> x, X* acted, const int32_t* ids, const float* weights, Weight<W> w13,
                        Weight<W> w2, long tokens, long top_k, long experts, long hidden, long inner) {
    const Tiles& tile = tiles();
    const long inner_width = padded(inner);

    std::vector<long> starts(experts + 1);
    for (long i = 0; i < tokens * top_k; i++)
        if (ids[i] >= 0) starts[ids[i] + 1]++;
    for (long e = 0; e < experts; e++) starts[e + 1] += starts[e];
    std::vector<int64_t> token(starts[experts]);
    std::vector<float> share(starts[experts]);
    std::vector<long> filled(starts.begin(), starts.end() - 1);
    for (long i = 0; i < tokens * top_k; i++)
        if (ids[i] >= 0) {
            const long row = filled[ids[i]]++;
            token[row] = i / top_k, share[row] = weights[i];
        }
    const bool can_pack = tile.pack && sizeof(X) == sizeof(bf16) && sizeof(W) == sizeof(bf16);
    const long most = can_pack ? AT_ONCE : AT_ONCE_UNPACKED;
    std::vector<Part> parts;
    for (long e = 0; e < experts; e++)
        for (long row = starts[e], left; (left = starts[e + 1] - row) > 0;) {
            const long count = (left + most - 1) / most, some = (left + count - 1) / count;  // all of like size
            parts.push_back({e, row, some});
            row += some;
        }

    const long inner_blocks = (inner + BLOCK - 1) / BLOCK;
    for_each(long(parts.size()) * inner_blocks, [&, acted](long item) {
        const Part part = parts[item / inner_blocks];
        const long first = item % inner_blocks * BLOCK, count = std::min(BLOCK, inner - first);
        const Rows<X> rows = {x.data, x.stride, token.data() + part.first};
        float both[AT_ONCE * 2 * BLOCK];  // gates and ups
        dot_both(rows, part.count, Block<W>{nth(w13, 2 * part.expert, inner), first, count},
                 Block<W>{nth(w13, 2 * part.expert + 1, inner), first, count}, hidden, both);
        for (long i = 0; i < part.count; i++) {
            float* const gates = both + i * 2 * BLOCK;
            tile.silu_and_multiply(gates, gates + BLOCK, count);
            X* const row = acted + (part.first + i) * inner_width;
            for (long n = 0; n < BLOCK && first + n < inner_width; n++) put(row, first + n, n < count ? gates[n] : 0.0f);
        }
    });
    const bool is_packed = can_pack && std::any_of(parts.begin(), parts.end(), [](const Part& part) { return part.count >= MANY; });
    const long width = is_packed ? 2 * BLOCK : BLOCK;  // few tokens have few items to share among threads
    for_each((hidden + width - 1) / width, [&, acted](long item) {
        const long first = item * width, count = std::min(width, hidden - first);
        const long here = std::min(BLOCK, count);
        std::vector<float> sums(tokens * width);
        float rows[AT_ONCE * 2 * BLOCK];
        for (const Part& part : parts) {
            const Weight<W> weight = nth(w2, part.expert, hidden);
            dot_both(Rows<X>{acted + part.first * inner_width, inner_width, nullptr}, part.count,
                     Block<W>{weight, first, here}, Block<W>{weight, first + here, count - here}, inner, rows);
            for (long i = 0; i < part.count; i++) {
                float* const sum = sums.data() + token[part.first + i] * width;
                for (long n = 0; n < count; n++) sum[n] += share[part.first + i] * rows[i * 2 * BLOCK + n];
            }
        }
        for (long t = 0; t < tokens; t++)
            for (long n = 0; n < count; n++) output[t * hidden + first + n] = to_bf16(sums[t * width + n]);
    });
}

template <class W>
static void all_experts(bf16* output, const bf16* x, long x_stride, const int32_t* ids, const float* weights,
                        Weight<W> w13, Weight<W> w2, float* scratch, long tokens, long top_k, long experts, long hidden,
                        long inner) {
    const Tiles& tile = tiles();
    if (tile.dot_bf16)
        return all_experts(output, Rows<bf16>{x, x_stride, nullptr}, reinterpret_cast<bf16*>(scratch), ids, weights, w13,
                           w2, tokens, top_k, experts, hidden, inner);
    const long width = padded(hidden);
    for_each(tokens, [=, &tile](long t) { tile.split(x + t * x_stride, hidden, scratch + t * width); });
    all_experts(output, Rows<float>{scratch, width, nullptr}, scratch + tokens * width, ids, weights, w13, w2, tokens,
                top_k, experts, hidden, inner);
}

extern "C" {

// output: bf16 [tokens, hidden]; x: bf16 [tokens, hidden], rows x_stride apart; ids: int32 [tokens, top_k], -1 for no
// expert of these; weights: fp32 [tokens, top_k]; w13: [experts, 2 inner, hidden], gate above up; w2: [experts, hidden,
// inner]; both in bf16, or in FP8 if there are scales: fp32 [experts, 2 ceil(inner / SCALED), ceil(hidden / SCALED)] and
// [experts, ceil(hidden / SCALED), ceil(inner / SCALED)]; scratch: fp32 [tokens, padded(hidden)] and then
// [tokens top_k, padded(inner)]; on a processor with products in bf16 only the latter, in bf16.
void longcat_experts(bf16* output, const bf16* x, long x_stride, const int32_t* ids, const float* weights,
                     const void* w13, const void* w2, const float* w13_scales, const float* w2_scales, float* scratch,
                     long tokens, long top_k, long experts, long hidden, long inner) {
    if (w13_scales)
        all_experts(output, x, x_stride, ids, weights, as_fp8(w13, hidden, w13_scales, hidden),
                    as_fp8(w2, inner, w2_scales, inner), scratch, tokens, top_k, experts, hidden, inner);
    else
        all_experts(output, x, x_stride, ids, weights, as_bf16(w13, hidden), as_bf16(w2, inner), scratch, tokens, top_k,
                    experts, hidden, inner);
}
}
