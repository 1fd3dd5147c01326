// A whole MLA of new tokens: projections, norms, rotary embedding, the cache's write and attention.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>

#include "kernels.h"

using namespace longcat;

extern "C" {

// output: bf16 [tokens, o.rows]; x: bf16 [tokens, qkv_a.columns], rows x_stride apart; cos and sin: fp32 [tokens, rope / 2];
// new_slots: int64 [tokens], where in the cache the tokens go; groups: of one model and cache, in which each token is once.
// Sizes of a model are those of the first group.
void longcat_mla(const Mla* mla, bf16* output, const bf16* x, long x_stride, const float* cos, const float* sin,
                 bf16* cache, const int64_t* new_slots, const Group* groups, long group_count, long tokens) {
    const Attention a = groups->attention;
    const long width = mla->qkv_a.rows, q_rank = mla->q_b.columns, queries = mla->q_b.rows, values = mla->o.columns;
    long most = tokens * padded(std::max({mla->qkv_a.columns, q_rank, values}));
    for (long i = 0; i < group_count; i++) most = std::max(most, longcat_attention_scratch(&groups[i].attention));
    const std::unique_ptr<bf16[]> qkv(new bf16[tokens * width]), normed(new bf16[tokens * q_rank]),
        query(new bf16[tokens * queries]), latents(new bf16[tokens * a.latent]), attended(new bf16[tokens * values]);
    const std::unique_ptr<float[]> scratch(new float[most]);
    bf16* const rope_keys = qkv.get() + q_rank + a.latent;
    const auto project = [&](const Projection& by, bf16* to, const bf16* from, long stride) {
        longcat_product(to, from, stride, by.weight, by.columns, by.scales, scratch.get(), tokens, by.rows, by.columns);
    };
    const auto norm = [&](const bf16* weight, bf16* to, const bf16* from, long columns) {
        longcat_rms_norm(to, nullptr, from, width, nullptr, 0, weight, mla->epsilon, tokens, columns);
    };
    project(mla->qkv_a, qkv.get(), x, x_stride);
    norm(mla->q_norm, normed.get(), qkv.get(), q_rank);
    norm(mla->kv_norm, latents.get(), qkv.get() + q_rank, a.latent);
    project(mla->q_b, query.get(), normed.get(), q_rank);
    longcat_rotate(query.get() + a.nope, queries, a.nope + a.rope, rope_keys, width, cos, sin, tokens, a.heads, a.rope / 2);
    longcat_write_latents(cache, a.cache_stride, latents.get(), a.latent, rope_keys, width, new_slots, tokens, a.latent,
                          a.rope);
    for (const Group* group = groups; group < groups + group_count; group++)
        longcat_attention(&group->attention, attended.get(), query.get(), group->rows, cache, group->slots,
                          group->positions, group->visible, mla->w_uk, mla->w_uv, scratch.get());
    project(mla->o, output, attended.get(), values);
}
}
