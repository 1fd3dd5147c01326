// Kernels that others are made of; their arguments are described where they are defined.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "tiles.h"

extern "C" {

struct Attention {
    long requests, queries, heads, nope, rope, latent, value;  // queries: of each request, its last tokens
    long longest, cache_stride, query_stride;  // longest: of the requests' contexts; a query's heads lie one after the other
    float scale;
};

struct Prompt {
    long queries, slots, heads, nope, rope, value;  // slots: those of the queries are the last ones
    long query_stride, rope_stride, output_stride;
    float scale;
};

struct Projection {  // [rows, columns], contiguous, in bf16, or in FP8 if there are scales
    const void* weight;
    const float* scales;
    long rows, columns;
};

struct Mla {
    Projection qkv_a, q_b, o;
    const longcat::bf16 *q_norm, *kv_norm, *w_uk, *w_uv;
    float epsilon;
};

struct Group {  // requests that are attended to at once, with equally many queries
    Attention attention;
    const int64_t *starts, *lengths;  // [requests]: the row of the first query; tokens, with those of the queries
    const int32_t* table;             // blocks of the cache, in rows table_stride apart
    const int64_t* table_rows;        // [requests]
    long table_stride, block_size;    // block_size: slots of a block
    const bool* trees;  // null, or [requests, queries, queries]: which of the last tokens a query sees, if not all up to it
};

struct Tokens {  // new ones
    const float *cos, *sin;  // fp32 [count, rope / 2]
    longcat::bf16* cache;
    const int64_t* slots;  // [count], where in the cache they go
    const Group* groups;   // of one model and cache, in which each wanted token is once
    long group_count, count;
    const int64_t* wanted;  // null for all, or [wanted_count]: those whose outputs are computed; others are only stored
    long wanted_count;
};

long longcat_prompt_scratch(const Prompt* prompt);
void longcat_prompt(const Prompt* prompt, longcat::bf16* output, const longcat::bf16* query, const longcat::bf16* expanded,
                    const longcat::bf16* rope_keys, uint32_t* scratch);
long longcat_attention_scratch(const Attention* attention);
void longcat_attention(const Group* group, longcat::bf16* output, const longcat::bf16* query, const longcat::bf16* cache,
                       const longcat::bf16* w_uk, const longcat::bf16* w_uv, float* scratch);
void longcat_mla(const Mla* mla, longcat::bf16* output, const longcat::bf16* x, long x_stride, const Tokens* tokens);
void longcat_experts(longcat::bf16* output, const longcat::bf16* x, long x_stride, const int32_t* ids, const float* weights,
                     const void* w13, const void* w2, const float* w13_scales, const float* w2_scales, float* scratch,
                     long tokens, long top_k, long experts, long hidden, long inner);
void longcat_product(longcat::bf16* output, const longcat::bf16* x, long x_stride, const void* weight, long weight_stride,
                     const float* scales, float* scratch, long tokens, long rows, long k);
void longcat_choose(int64_t* chosen, const longcat::bf16* x, long x_stride, const longcat::bf16* weight, float* scratch,
                    long tokens, long rows, long k);
void longcat_rms_norm(longcat::bf16* output, longcat::bf16* sum, const longcat::bf16* x, long x_stride,
                      const longcat::bf16* residual, long residual_stride, const longcat::bf16* weight, float epsilon,
                      long rows, long columns);
void longcat_rotate(longcat::bf16* x, long x_stride, long head_stride, const float* cos, const float* sin, long tokens,
                    long heads, long pairs);
void longcat_write_latents(longcat::bf16* cache, long cache_stride, const longcat::bf16* latents, long latent_stride,
                           const longcat::bf16* keys, long key_stride, const int64_t* slots, long tokens, long latent,
                           long rope);
}
