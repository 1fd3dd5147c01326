// Kernels that others are made of; their arguments are described where they are defined.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "tiles.h"

extern "C" {

struct Attention {
    long requests, queries, heads, nope, rope, latent, value;  // queries: of each request
    long slots, cache_stride, query_stride;  // slots: of each request; a query's heads lie one after the other
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

struct Group {  // requests that are attended to at once
    Attention attention;
    const int64_t *rows, *slots, *positions;
    const bool* visible;
};

long longcat_prompt_scratch(const Prompt* prompt);
void longcat_prompt(const Prompt* prompt, longcat::bf16* output, const longcat::bf16* query, const longcat::bf16* expanded,
                    const longcat::bf16* rope_keys, uint32_t* scratch);
long longcat_attention_scratch(const Attention* attention);
void longcat_attention(const Attention* attention, longcat::bf16* output, const longcat::bf16* query, const int64_t* rows,
                       const longcat::bf16* cache, const int64_t* slots, const int64_t* positions, const bool* visible,
                       const longcat::bf16* w_uk, const longcat::bf16* w_uv, float* scratch);
void longcat_mla(const Mla* mla, longcat::bf16* output, const longcat::bf16* x, long x_stride, const float* cos,
                 const float* sin, longcat::bf16* cache, const int64_t* new_slots, const Group* groups, long group_count,
                 long tokens);
void longcat_experts(longcat::bf16* output, const longcat::bf16* x, long x_stride, const int32_t* ids, const float* weights,
                     const void* w13, const void* w2, const float* w13_scales, const float* w2_scales, float* scratch,
                     long tokens, long top_k, long experts, long hidden, long inner);
void longcat_product(longcat::bf16* output, const longcat::bf16* x, long x_stride, const void* weight, long weight_stride,
                     const float* scales, float* scratch, long tokens, long rows, long k);
void longcat_rms_norm(longcat::bf16* output, longcat::bf16* sum, const longcat::bf16* x, long x_stride,
                      const longcat::bf16* residual, long residual_stride, const longcat::bf16* weight, float epsilon,
                      long rows, long columns);
void longcat_rotate(longcat::bf16* queries, long query_stride, long head_stride, longcat::bf16* keys, long key_stride,
                    const float* cos, const float* sin, long tokens, long heads, long pairs);
void longcat_write_latents(longcat::bf16* cache, long cache_stride, const longcat::bf16* latents, long latent_stride,
                           const longcat::bf16* keys, long key_stride, const int64_t* slots, long tokens, long latent,
                           long rope);
}
