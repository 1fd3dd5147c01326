// Half of a decoder layer, an attention and a dense FFN with the norms before them; the MTP layer, which has one; and
// chains of drafts.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"

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

// outputs, of the FFN, and inputs, of the FFN, and sum, to which the outputs are to be added: bf16 [wanted tokens, hidden];
// x: bf16 [tokens, hidden], rows x_stride apart; residual: null, or bf16 [tokens, hidden], to which x is added first, of rows
// residual_stride apart.
void longcat_half_layer(const HalfLayer* half, bf16* outputs, bf16* inputs, bf16* sum, const bf16* x, long x_stride,
                        const bf16* residual, long residual_stride, const Tokens* tokens) {
    const long hidden = half->down.rows, inner = half->down.columns, count = tokens->count;
    const long wanted = tokens->wanted ? tokens->wanted_count : count;
    const std::unique_ptr<bf16[]> normed(new bf16[count * hidden]), before(new bf16[count * hidden]),
        kept(new bf16[wanted * hidden]), attended(new bf16[wanted * hidden]);
    const std::unique_ptr<float[]> scratch(new float[wanted * (padded(hidden) + padded(inner))]);
    const std::vector<int32_t> the_only_expert(wanted, 0);
    const std::vector<float> all_of_it(wanted, 1.0f);
    longcat_rms_norm(normed.get(), before.get(), x, x_stride, residual, residual_stride, half->input_norm, half->epsilon,
                     count, hidden);
    longcat_mla(half->attention, attended.get(), normed.get(), hidden, tokens);
    const bf16* summed = residual ? before.get() : x;
    long stride = residual ? hidden : x_stride;
    if (tokens->wanted) {
        for (long i = 0; i < wanted; i++) std::copy_n(summed + tokens->wanted[i] * stride, hidden, kept.get() + i * hidden);
        summed = kept.get(), stride = hidden;
    }
    longcat_rms_norm(inputs, sum, attended.get(), hidden, summed, stride, half->ffn_norm, half->epsilon, wanted, hidden);
    longcat_experts(outputs, inputs, hidden, the_only_expert.data(), all_of_it.data(), half->gate_up.weight,
                    half->down.weight, half->gate_up.scales, half->down.scales, scratch.get(), wanted, 1, 1, hidden, inner);
}

// output: bf16 [wanted tokens, hidden]; embedded and hidden_states: bf16 [tokens, hidden], rows embedded_stride and
// hidden_stride apart.
void longcat_mtp(const Mtp* mtp, bf16* output, const bf16* embedded, long embedded_stride, const bf16* hidden_states,
                 long hidden_stride, const Tokens* tokens) {
    const Projection& by = mtp->eh_proj;
    const long hidden = by.rows, count = tokens->count, wanted = tokens->wanted ? tokens->wanted_count : count;
    const std::unique_ptr<bf16[]> both(new bf16[count * by.columns]), x(new bf16[count * hidden]),
        outputs(new bf16[wanted * hidden]), inputs(new bf16[wanted * hidden]), sum(new bf16[wanted * hidden]),
        last_sum(new bf16[wanted * hidden]);
    const std::unique_ptr<float[]> scratch(new float[count * padded(by.columns)]);
    for (long t = 0; t < count; t++) {
        const auto norm = [&](bf16* to, const bf16* from, const bf16* weight) {
            longcat_rms_norm(to, nullptr, from, hidden, nullptr, 0, weight, mtp->half->epsilon, 1, hidden);
        };
        norm(both.get() + t * by.columns, embedded + t * embedded_stride, mtp->embedded_norm);
        norm(both.get() + t * by.columns + hidden, hidden_states + t * hidden_stride, mtp->hidden_norm);
    }
    longcat_product(x.get(), both.get(), by.columns, by.weight, by.columns, by.scales, scratch.get(), count, hidden,
                    by.columns);
    longcat_half_layer(mtp->half, outputs.get(), inputs.get(), sum.get(), x.get(), hidden, nullptr, 0, tokens);
    longcat_rms_norm(output, last_sum.get(), outputs.get(), hidden, sum.get(), hidden, mtp->last_norm, mtp->half->epsilon,
                     wanted, hidden);
}

// A pass over tokens, int64 [tokens], and a draft of each wanted one, int64 [wanted tokens]: what `longcat_choose` chooses of
// the head. output and hidden_states: as of `longcat_mtp`; embedding and head: bf16 [.., hidden], contiguous.
void longcat_draft(const Mtp* mtp, int64_t* drafts, bf16* output, const int64_t* ids, const bf16* hidden_states,
                   long hidden_stride, const bf16* embedding, const bf16* head, long vocabulary, const Tokens* tokens) {
    const long hidden = mtp->eh_proj.rows, count = tokens->count, wanted = tokens->wanted ? tokens->wanted_count : count;
    const std::unique_ptr<bf16[]> embedded(new bf16[count * hidden]);
    const std::unique_ptr<float[]> scratch(new float[wanted * padded(hidden)]);
    for (long t = 0; t < count; t++) std::copy_n(embedding + ids[t] * hidden, hidden, embedded.get() + t * hidden);
    longcat_mtp(mtp, output, embedded.get(), hidden, hidden_states, hidden_stride, tokens);
    longcat_choose(drafts, output, hidden, head, scratch.get(), wanted, vocabulary, hidden);
}

// A chain of drafts, one token of each request in a pass. ids: int64 [passes + 1, requests], of which the first row is given;
// outputs: bf16 [passes, requests, hidden], which each pass hands to the next; tokens: of the first pass, in groups of one query
// a request; cos, sin and slots, and lengths of a group, int64 [passes, requests of the group], of the later ones follow.
void longcat_chain(const Mtp* mtp, int64_t* ids, bf16* outputs, const bf16* hidden_states, long hidden_stride,
                   const bf16* embedding, const bf16* head, long vocabulary, const Tokens* tokens, long passes) {
    const long hidden = mtp->eh_proj.rows, requests = tokens->count;
    std::vector<Group> groups(tokens->groups, tokens->groups + tokens->group_count);
    Tokens now = *tokens;
    now.groups = groups.data();
    for (long pass = 0; pass < passes; pass++) {
        bf16* const output = outputs + pass * requests * hidden;
        longcat_draft(mtp, ids + (pass + 1) * requests, output, ids + pass * requests, hidden_states, hidden_stride, embedding,
                      head, vocabulary, &now);
        hidden_states = output, hidden_stride = hidden;
        const long angles = requests * groups.front().attention.rope / 2;
        now.cos += angles, now.sin += angles, now.slots += requests;
        for (Group& group : groups) group.lengths += group.attention.requests;
    }
}
}
