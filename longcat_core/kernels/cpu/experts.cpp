// All FFN experts of a layer for all tokens, each with the rows that chose it, in two passes over the weights.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "tiles.h"

using namespace longcat;

extern "C" {

// output: bf16 [tokens, hidden]; x: bf16 [tokens, hidden], rows x_stride apart; ids: int32 [tokens, top_k], -1 for no
// expert of these; weights: fp32 [tokens, top_k]; w13: bf16 [experts, 2 inner, hidden], gate above up; w2: bf16 [experts,
// hidden, inner]; scratch: fp32 [tokens, padded(hidden)] and then [tokens top_k, padded(inner)].
void longcat_experts(bf16* output, const bf16* x, long x_stride, const int32_t* ids, const float* weights,
                     const bf16* w13, const bf16* w2, float* scratch, long tokens, long top_k, long experts, long hidden,
                     long inner) {
    struct Part {  // an expert's rows, a few of them at a time, so that many rows are shared among threads
        long expert, first, count;
    };
    constexpr long BLOCK = 32, AT_ONCE = 64;
    const Tiles& tile = tiles();
    const long width = padded(hidden), inner_width = padded(inner);
    float* const inputs = scratch;
    float* const acted = scratch + tokens * width;

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
    std::vector<Part> parts;
    for (long e = 0; e < experts; e++)
        for (long row = starts[e]; row < starts[e + 1]; row += AT_ONCE)
            parts.push_back({e, row, std::min(AT_ONCE, starts[e + 1] - row)});

    for_each(tokens, [=, &tile](long t) { tile.split(x + t * x_stride, hidden, inputs + t * width); });
    const long inner_blocks = (inner + BLOCK - 1) / BLOCK;
    for_each(long(parts.size()) * inner_blocks, [&, inputs, acted](long item) {
        const Part part = parts[item / inner_blocks];
        const long first = item % inner_blocks * BLOCK, count = std::min(BLOCK, inner - first);
        const bf16* const gate = w13 + (part.expert * 2 * inner + first) * hidden;
        const Rows<float> rows = {inputs, width, token.data() + part.first};
        float gates[AT_ONCE * BLOCK], ups[AT_ONCE * BLOCK];
        tile.dot(rows, part.count, {gate, hidden, nullptr}, count, hidden, gates, BLOCK);
        tile.dot(rows, part.count, {gate + inner * hidden, hidden, nullptr}, count, hidden, ups, BLOCK);
        for (long i = 0; i < part.count; i++) {
            tile.silu_and_multiply(gates + i * BLOCK, ups + i * BLOCK, count);
            float* const row = acted + (part.first + i) * inner_width;
            for (long n = 0; n < BLOCK && first + n < inner_width; n++)
                row[split_place(first + n)] = n < count ? gates[i * BLOCK + n] : 0.0f;
        }
    });
    for_each((hidden + BLOCK - 1) / BLOCK, [&, acted](long item) {
        const long first = item * BLOCK, count = std::min(BLOCK, hidden - first);
        std::vector<float> sums(tokens * BLOCK);
        float rows[AT_ONCE * BLOCK];
        for (const Part& part : parts) {
            tile.dot({acted + part.first * inner_width, inner_width, nullptr}, part.count,
                     {w2 + (part.expert * hidden + first) * inner, inner, nullptr}, count, inner, rows, BLOCK);
            for (long i = 0; i < part.count; i++) {
                float* const sum = sums.data() + token[part.first + i] * BLOCK;
                for (long n = 0; n < count; n++) sum[n] += share[part.first + i] * rows[i * BLOCK + n];
            }
        }
        for (long t = 0; t < tokens; t++)
            for (long n = 0; n < count; n++) output[t * hidden + first + n] = to_bf16(sums[t * BLOCK + n]);
    });
}
}
