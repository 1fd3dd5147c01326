// Half of a decoder layer, an attention and a dense FFN with the norms before them; the MTP layer, which has one; and
// chains of drafts.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

using namespace longcat;

namespace {

struct HalfLayer {
    const bf16* input_norm;
    const Mla* attention;
    const bf16* ffn_norm;
    Projection gate_up, down;  // gate above up
    float epsilon;
};

struct Mtp {
    const bf16 *embedded_norm, *hidden_norm, *last_norm;
    Projection eh_proj;
    const HalfLayer* half;
};

}  // namespace

extern "C" {

// outputs, of the FFN, and inputs, of the FFN, and sum, to which the outputs are to be added: bf16 [tokens, hidden]; x: bf16
// [tokens, hidden], rows x_stride apart; residual: null, or bf16 [tokens, hidden], to which x is added first, of rows
// residual_stride apart; the rest as of `longcat_mla`.
void longcat_half_layer(const HalfLayer* half, bf16* outputs, bf16* inputs, bf16* sum, const bf16* x, long x_stride,
                  const bf16* residual, long residual_stride, const float* cos, const float* sin, bf16* cache,
                  const int64_t* new_slots, const Group* groups, long group_count, long tokens) {
    const long hidden = half->down.rows, inner = half->down.columns;
    const std::unique_ptr<bf16[]> normed(new bf16[tokens * hidden]), before(new bf16[tokens * hidden]),
        attended(new bf16[tokens * hidden]);
    const std::unique_ptr<float[]> scratch(new float[tokens * (padded(hidden) + padded(inner))]);
    const std::vector<int32_t> the_only_expert(tokens, 0);
    const std::vector<float> all_of_it(tokens, 1.0f);
    longcat_rms_norm(normed.get(), before.get(), x, x_stride, residual, residual_stride, half->input_norm, half->epsilon,
                     tokens, hidden);
    longcat_mla(half->attention, attended.get(), normed.get(), hidden, cos, sin, cache, new_slots, groups, group_count,
                tokens);
    longcat_rms_norm(inputs, sum, attended.get(), hidden, residual ? before.get() : x, residual ? hidden : x_stride,
                     half->ffn_norm, half->epsilon, tokens, hidden);
    longcat_experts(outputs, inputs, hidden, the_only_expert.data(), all_of_it.data(), half->gate_up.weight,
                    half->down.weight, half->gate_up.scales, half->down.scales, scratch.get(), tokens, 1, 1, hidden, inner);
}

// output: bf16 [tokens, hidden]; embedded and hidden_states: bf16 [tokens, hidden], rows embedded_stride and hidden_stride
// apart; the rest as of `longcat_mla`.
void longcat_mtp(const Mtp* mtp, bf16* output, const bf16* embedded, long embedded_stride, const bf16* hidden_states,
                 long hidden_stride, const float* cos, const float* sin, bf16* cache, const int64_t* new_slots,
                 const Group* groups, long group_count, long tokens) {
    const Projection& by = mtp->eh_proj;
    const long hidden = by.rows;
    const std::unique_ptr<bf16[]> both(new bf16[tokens * by.columns]), x(new bf16[tokens * hidden]),
        outputs(new bf16[tokens * hidden]), inputs(new bf16[tokens * hidden]), sum(new bf16[tokens * hidden]),
        last_sum(new bf16[tokens * hidden]);
    const std::unique_ptr<float[]> scratch(new float[tokens * padded(by.columns)]);
    for (long t = 0; t < tokens; t++) {
        const auto norm = [&](bf16* to, const bf16* from, const bf16* weight) {
            longcat_rms_norm(to, nullptr, from, hidden, nullptr, 0, weight, mtp->half->epsilon, 1, hidden);
        };
        norm(both.get() + t * by.columns, embedded + t * embedded_stride, mtp->embedded_norm);
        norm(both.get() + t * by.columns + hidden, hidden_states + t * hidden_stride, mtp->hidden_norm);
    }
    longcat_product(x.get(), both.get(), by.columns, by.weight, by.columns, by.scales, scratch.get(), tokens, hidden,
                    by.columns);
    longcat_half_layer(mtp->half, outputs.get(), inputs.get(), sum.get(), x.get(), hidden, nullptr, 0, cos, sin, cache, new_slots,
                 groups, group_count, tokens);
    longcat_rms_norm(output, last_sum.get(), outputs.get(), hidden, sum.get(), hidden, mtp->last_norm, mtp->half->epsilon,
                     tokens, hidden);
}

// A chain of drafts, one token of each request in a pass, chosen from its logits: the first of the greatest. tokens: int64
// [passes + 1, requests], of which the first row is given; logits: bf16 [passes, requests, vocabulary]; hidden_states: as of
// the pass before; embedding and head: bf16 [.., hidden], contiguous; cos and sin: fp32 [passes, requests, rope / 2];
// new_slots: int64 [passes, requests]; groups: of one query a request, of positions int64 [passes, requests of the group].
void longcat_chain(const Mtp* mtp, int64_t* tokens, bf16* logits, const bf16* hidden_states, long hidden_stride,
                   const bf16* embedding, const bf16* head, long vocabulary, const float* cos, const float* sin, bf16* cache,
                   const int64_t* new_slots, const Group* groups, long group_count, long requests, long passes) {
    const long hidden = mtp->eh_proj.rows, angles = requests * groups->attention.rope / 2;
    const std::unique_ptr<bf16[]> embedded(new bf16[requests * hidden]), made(new bf16[2 * requests * hidden]);
    const std::unique_ptr<float[]> scratch(new float[requests * padded(hidden)]);
    std::vector<Group> now(groups, groups + group_count);
    for (long pass = 0; pass < passes; pass++) {
        bf16* const output = made.get() + pass % 2 * requests * hidden;
        for (long i = 0; i < requests; i++)
            std::copy_n(embedding + tokens[pass * requests + i] * hidden, hidden, embedded.get() + i * hidden);
        longcat_mtp(mtp, output, embedded.get(), hidden, hidden_states, hidden_stride, cos + pass * angles,
                    sin + pass * angles, cache, new_slots + pass * requests, now.data(), group_count, requests);
        hidden_states = output, hidden_stride = hidden;
        bf16* const of_pass = logits + pass * requests * vocabulary;
        longcat_product(of_pass, output, hidden, head, hidden, nullptr, scratch.get(), requests, vocabulary, hidden);
        for_each(requests, [=](long i) {
            const bf16* const of_request = of_pass + i * vocabulary;
            long best = 0;
            for (long id = 1; id < vocabulary; id++)
                if (to_float(of_request[id]) > to_float(of_request[best])) best = id;
            tokens[(pass + 1) * requests + i] = best;
        });
        for (Group& group : now) group.positions += group.attention.requests;
    }
}
}
