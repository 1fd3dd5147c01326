// The choice of a router: which FFN experts a token takes with which weight, and how much of itself it keeps.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "tiles.h"

using namespace longcat;

extern "C" {

// ids: int32 [tokens, top_k]; weights: fp32 [tokens, top_k]; identity: fp32 [tokens]; logits: fp32 [tokens, experts], of which
// the first ffn_experts have an FFN; bias: fp32 [experts].
void longcat_route(int32_t* ids, float* weights, float* identity, const float* logits, const float* bias, float scale,
                   long tokens, long experts, long ffn_experts, long top_k) {
    const long at_once = std::max(1L, WORTH_A_THREAD / (8 * experts)), blocks = (tokens + at_once - 1) / at_once;
    for_each(blocks, [=](long block) {
        std::vector<float> scores(experts), biased(experts);
        std::vector<int32_t> order(experts);
        for (long t = block * at_once; t < std::min(tokens, (block + 1) * at_once); t++) {
            const float* const from = logits + t * experts;
            std::copy_n(from, experts, scores.data());
            const float total = tiles().exponentials(scores.data(), experts, *std::max_element(from, from + experts));
            for (long e = 0; e < experts; e++) scores[e] /= total, biased[e] = scores[e] + bias[e];
            std::iota(order.begin(), order.end(), 0);
            std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int32_t a, int32_t b) {
                return biased[a] != biased[b] ? biased[a] > biased[b] : a < b;
            });
            identity[t] = 0.0f;
            for (long k = 0; k < top_k; k++) {
                const int32_t chosen = order[k];
                const bool has_ffn = chosen < ffn_experts;
                const float weight = scores[chosen] * scale;
                ids[t * top_k + k] = has_ffn ? chosen : -1;
                weights[t * top_k + k] = has_ffn ? weight : 0.0f;
                if (!has_ffn) identity[t] += weight;
            }
        }
    });
}
}
