// The expert choices of a step, added to what was counted before.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" {

// tokens: int64 [layers, top_k + 1]; busiest_expert and busiest_rank: int64 [layers]; ids: int32 [layers, rows, top_k], of
// experts, or -1, with layers and rows so far apart; is_real: int64 [rows]; rank_of_expert: int64 [experts].
void longcat_count_choices(int64_t* tokens, int64_t* busiest_expert, int64_t* busiest_rank, const int32_t* ids,
                           long layer_stride, long row_stride, const int64_t* is_real, const int64_t* rank_of_expert,
                           long layers, long rows, long top_k, long experts, long ranks) {
    std::vector<int64_t> of_expert(experts), of_rank(ranks);
    for (long layer = 0; layer < layers; layer++) {
        std::fill(of_expert.begin(), of_expert.end(), 0);
        std::fill(of_rank.begin(), of_rank.end(), 0);
        for (long row = 0; row < rows; row++) {
            if (!is_real[row]) continue;
            const int32_t* const chosen = ids + layer * layer_stride + row * row_stride;
            long taken = 0;
            for (long k = 0; k < top_k; k++)
                if (chosen[k] >= 0 && chosen[k] < experts) taken++, of_expert[chosen[k]]++;
            tokens[layer * (top_k + 1) + taken]++;
        }
        busiest_expert[layer] += *std::max_element(of_expert.begin(), of_expert.end());
        if (ranks == 1) continue;
        for (long e = 0; e < experts; e++) of_rank[rank_of_expert[e]] += of_expert[e];
        busiest_rank[layer] += *std::max_element(of_rank.begin(), of_rank.end());
    }
}
}
