// A whole MLA of new tokens: projections, norms, rotary embedding, the cache's write and attention.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>

#include "kernels.h"

using namespace longcat;

extern "C" {

// output: bf16 [wanted tokens, o.rows]; x: bf16 [tokens, qkv_a.columns], rows x_stride apart. Sizes of a model are those of
// the first group.
void longcat_mla(const Mla* mla, bf16* output, const bf16* x, long x_stride, const Tokens* tokens) {
    const Attention a = tokens->groups->attention;
    const long count = tokens->count, wanted = tokens->wanted ? tokens->wanted_count : count;
    const long width = mla->qkv_a.rows, q_rank = mla->q_b.columns, queries = mla->q_b.rows, values = mla->o.columns;
    long most = count * padded(std::max({mla->qkv_a.columns, q_rank, values}));
    for (long i = 0; i < tokens->group_count; i++)
        most = std::max(most, longcat_attention_scratch(&tokens->groups[i].attention));
    const std::unique_ptr<bf16[]> qkv(new bf16[count * width]), chosen(new bf16[wanted * q_rank]),
        normed(new bf16[wanted * q_rank]), query(new bf16[wanted * queries]), latents(new bf16[count * a.latent]),
        attended(new bf16[wanted * values]);
    const std::unique_ptr<float[]> scratch(new float[most]), angles(new float[wanted * a.rope]);
    const auto project = [&](const Projection& by, bf16* to, const bf16* from, long stride, long rows) {
        longcat_product(to, from, stride, by.weight, by.columns, by.scales, scratch.get(), rows, by.rows, by.columns);
    };
    const auto norm = [&](const bf16* weight, bf16* to, const bf16* from, long stride, long rows, long columns) {
        longcat_rms_norm(to, nullptr, from, stride, nullptr, 0, weight, mla->epsilon, rows, columns);
    };
    project(mla->qkv_a, qkv.get(), x, x_stride, count);
    bf16* const rope_keys = qkv.get() + q_rank + a.latent;
    norm(mla->kv_norm, latents.get(), qkv.get() + q_rank, width, count, a.latent);
    longcat_rotate(rope_keys, width, 0, tokens->cos, tokens->sin, count, 1, a.rope / 2);
    longcat_write_latents(tokens->cache, a.cache_stride, latents.get(), a.latent, rope_keys, width, tokens->slots, count,
                          a.latent, a.rope);
    const bf16* of_queries = qkv.get();
    long stride = width;
    const float *cos = tokens->cos, *sin = tokens->sin;
    if (tokens->wanted) {
        const long pairs = a.rope / 2;
        float* const sines = angles.get() + wanted * pairs;
        for (long i = 0; i < wanted; i++) {
            const long token = tokens->wanted[i];
            std::copy_n(of_queries + token * width, q_rank, chosen.get() + i * q_rank);
            std::copy_n(cos + token * pairs, pairs, angles.get() + i * pairs);
            std::copy_n(sin + token * pairs, pairs, sines + i * pairs);
        }
        of_queries = chosen.get(), stride = q_rank, cos = angles.get(), sin = sines;
    }
    norm(mla->q_norm, normed.get(), of_queries, stride, wanted, q_rank);
    project(mla->q_b, query.get(), normed.get(), q_rank, wanted);
    longcat_rotate(query.get() + a.nope, queries, a.nope + a.rope, cos, sin, wanted, a.heads, a.rope / 2);
    for (const Group* group = tokens->groups; group < tokens->groups + tokens->group_count; group++)
        longcat_attention(group, attended.get(), query.get(), tokens->cache, mla->w_uk, mla->w_uv, scratch.get());
    project(mla->o, output, attended.get(), values, wanted);
}
}
