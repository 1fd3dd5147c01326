// The expert choices of a step, added to what was counted before.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" {

// tokens: int64 [layers, top_k + 1]; busiest_expert and busiest_rank: int64 [layers]; ids: of each layer int32
// [rows, top_k], of experts, or -1; slots: int64 [rows], of which first_slot and those after it are of tokens;
// rank_of_expert: int64 [experts].
void longcat_add_choices(int64_t* tokens, int64_t* busiest_expert, int64_t* busiest_rank, const int32_t* const* ids,
                           const int64_t* slots, long first_slot, const int64_t* rank_of_expert, long layers, long rows,
                           long top_k, long experts, long ranks) {
    std::vector<int64_t> of_expert(experts), of_rank(ranks);
    for (long layer = 0; layer < layers; layer++) {
        std::fill(of_expert.begin(), of_expert.end(), 0);
        std::fill(of_rank.begin(), of_rank.end(), 0);
        int64_t most_of_expert = 0, most_of_rank = 0;
        for (long row = 0; row < rows; row++) {
            if (slots[row] < first_slot) continue;
            long taken = 0;
            for (long k = 0; k < top_k; k++) {
                const int32_t expert = ids[layer][row * top_k + k];
                if (expert < 0 || expert >= experts) continue;
                taken++;
                most_of_expert = std::max(most_of_expert, ++of_expert[expert]);
                most_of_rank = std::max(most_of_rank, ++of_rank[rank_of_expert[expert]]);
            }
            tokens[layer * (top_k + 1) + taken]++;
        }
        busiest_expert[layer] += most_of_expert;
        if (ranks > 1) busiest_rank[layer] += most_of_rank;
    }
}
}
