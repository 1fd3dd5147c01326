// MLA over a paged latent cache, in latent space: decoding and verification of a group of requests.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"

using namespace longcat;

static constexpr long BLOCK = 64;  // rows of a weight, or slots of the cache; a multiple of GROUP

// store(n, h, first, count, sums), with sums[i] = x(h)(n) w(h)[first + i], for each head h and each of `all` rows of x(h),
// for a block of the weight's rows after the other; w: bf16 [heads, rows, k].
template <class X, class Store>
static void for_each_head(long heads, long all, X x, const bf16* w, long rows, long k, Store store) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
    for_each(heads * blocks, [=](long item) {
        const long h = item / blocks, first = item % blocks * BLOCK, count = std::min(BLOCK, rows - first);
        std::vector<float> sums(all * BLOCK);
        dot(tiles(), x(h), all, as_bf16(w + h * rows * k, k), first, count, k, sums.data(), BLOCK);
        for (long n = 0; n < all; n++) store(n, h, first, count, sums.data() + n * BLOCK);
    });
}

// How many parts the slots of a request are attended to in, each by one thread.
static long parts_of(const Attention& a) {
    const long threads = omp_get_max_threads(), items = a.requests * ((a.heads + 3) / 4);
    return std::max(1L, std::min((2 * threads + items - 1) / items, a.slots / 512));
}

extern "C" {

// How many fp32 `longcat_attention` needs as its scratch.
long longcat_attention_scratch(const Attention* a) {
    return a->requests * a->queries * a->heads *
           (padded(a->latent + a->rope) + parts_of(*a) * (a->latent + 2) + padded(a->nope));
}

// output: bf16 [T, heads, value], of which rows `rows` are written; query: bf16 [T, heads, nope + rope]; rows: int64
// [requests, queries]; cache: bf16 [slots of the cache, latent + rope]; slots: int64 [requests, slots]; positions: int64
// [requests, queries], a query sees the slots up to its own; or `visible`, bool [requests, queries, slots], says which;
// w_uk: bf16 [heads, latent, nope]; w_uv: bf16 [heads, value, latent]; latent is a multiple of 32. scratch: fp32
// [N, heads, padded(latent + rope)], then [parts, N, heads, latent + 2], where N = requests queries, then
// [N, heads, padded(nope)].
void longcat_attention(const Attention* attention, bf16* output, const bf16* query, const int64_t* rows,
                       const bf16* cache, const int64_t* slots, const int64_t* positions, const bool* visible,
                       const bf16* w_uk, const bf16* w_uv, float* scratch) {
    const Attention a = *attention;
    const Tiles& tile = tiles();
    const long all = a.requests * a.queries, width = padded(a.latent + a.rope), nope_width = padded(a.nope);
    const long key = a.latent + a.rope, parts = parts_of(a);
    const long kept = a.latent + 2;  // a context with its greatest score and its sum of exponentials
    float* const in_latent = scratch;
    float* const contexts = in_latent + all * a.heads * width;
    float* const without_rope = contexts + parts * all * a.heads * kept;

    // Queries into latent space, a head at a time, for all requests.
    for_each(all * a.heads, [=, &tile](long item) {
        const long n = item / a.heads, h = item % a.heads;
        const bf16* const from = query + rows[n] * a.query_stride + h * (a.nope + a.rope);
        if (!tile.dot_bf16) tile.split(from, a.nope, without_rope + item * nope_width);
        float* const to = in_latent + item * width;
        for (long i = 0; i < a.rope; i++) to[split_place(a.latent + i)] = to_float(from[a.nope + i]) * a.scale;
        for (long i = key; i < width; i++) to[split_place(i)] = 0.0f;
    });
    const auto store = [=](long n, long h, long first, long count, const float* made) {
        float* const to = in_latent + (n * a.heads + h) * width + first;
        for (long group = 0; group < count; group += GROUP)
            for (long i = 0; i < GROUP / 2; i++) {
                to[group + i] = made[group + 2 * i] * a.scale;
                to[group + GROUP / 2 + i] = made[group + 2 * i + 1] * a.scale;
            }
    };
    const auto in_bf16 = [=](long h) { return Rows<bf16>{query + h * (a.nope + a.rope), a.query_stride, rows}; };
    const auto in_fp32 = [=](long h) {
        return Rows<float>{without_rope + h * nope_width, a.heads * nope_width, nullptr};
    };
    if (tile.dot_bf16)
        for_each_head(a.heads, all, in_bf16, w_uk, a.latent, a.nope, store);
    else
        for_each_head(a.heads, all, in_fp32, w_uk, a.latent, a.nope, store);

    // Scores, softmax and contexts of some heads of a request over a part of its slots, a block of slots at a time.
    const long threads = omp_get_max_threads();
    long heads = a.heads;
    while (heads > 4 && a.requests * parts * ((a.heads + heads - 1) / heads) < 2 * threads) heads = (heads + 1) / 2;
    const long head_blocks = (a.heads + heads - 1) / heads;
    const long part_slots = ((a.slots + parts - 1) / parts + BLOCK - 1) / BLOCK * BLOCK;
    for_each(a.requests * parts * head_blocks, [=, &tile](long item) {
        const long request = item / (parts * head_blocks), part = item / head_blocks % parts;
        const long first_head = item % head_blocks * heads, some = std::min(heads, a.heads - first_head);
        const long last = std::min(a.slots, (part + 1) * part_slots);
        std::vector<float> weights(some * BLOCK);
        for (long q = 0; q < a.queries; q++) {
            const long n = request * a.queries + q;
            float* const to = contexts + ((part * all + n) * a.heads + first_head) * kept;
            for (long h = 0; h < some; h++) {
                std::fill_n(to + h * kept, a.latent, 0.0f);
                to[h * kept + a.latent] = -INFINITY, to[h * kept + a.latent + 1] = 0.0f;
            }
            const long end = visible ? last : std::min(last, long(positions[n]) + 1);
            for (long first = part * part_slots; first < end; first += BLOCK) {
                const long count = std::min(BLOCK, end - first);
                const Rows<bf16> keys = {cache, a.cache_stride, slots + request * a.slots + first};
                tile.dot({in_latent + (n * a.heads + first_head) * width, width, nullptr}, some, keys, count, key,
                         weights.data(), BLOCK);
                for (long h = 0; h < some; h++) {
                    float* const scores = weights.data() + h * BLOCK;
                    if (visible)
                        for (long i = 0; i < count; i++)
                            if (!visible[n * a.slots + first + i]) scores[i] = -INFINITY;
                    float& greatest = to[h * kept + a.latent];
                    const float now = std::max(greatest, *std::max_element(scores, scores + count));
                    if (now == -INFINITY) {  // nothing is seen yet
                        std::fill_n(scores, count, 0.0f);
                        continue;
                    }
                    const float shrink = std::exp(greatest - now);
                    if (shrink != 1.0f)
                        for (long i = 0; i < a.latent; i++) to[h * kept + i] *= shrink;
                    greatest = now;
                    float& total = to[h * kept + a.latent + 1];
                    total = total * shrink + tile.exponentials(scores, count, now);
                }
                tile.mix(weights.data(), BLOCK, some, keys, count, a.latent, to, kept);
            }
        }
    });

    // The parts put together, and values out of latent space, a head at a time, for all requests.
    for_each(all * a.heads, [=](long item) {
        float* const first = contexts + item * kept;
        float greatest = -INFINITY, total = 0.0f;
        for (long part = 0; part < parts; part++)
            greatest = std::max(greatest, first[part * all * a.heads * kept + a.latent]);
        for (long part = 0; part < parts; part++) {
            const float* const from = first + part * all * a.heads * kept;
            total += from[a.latent + 1] * std::exp(from[a.latent] - greatest);
        }
        for (long part = parts; part-- > 0;) {  // the first one last, as the sum takes its place
            const float* const from = first + part * all * a.heads * kept;
            const float share = std::exp(from[a.latent] - greatest) / total;
            float* const sum = parts > 1 ? in_latent + item * width : first;
            for (long i = 0; i < a.latent; i++) sum[i] = (part + 1 < parts ? sum[i] : 0.0f) + share * from[i];
        }
    });
    const float* const found = parts > 1 ? in_latent : contexts;
    const long stride = parts > 1 ? width : kept;
    const auto contexts_of = [=](long h) { return Rows<float>{found + h * stride, a.heads * stride, nullptr}; };
    const auto store_values = [=](long n, long h, long first, long count, const float* made) {
        bf16* const to = output + (rows[n] * a.heads + h) * a.value + first;
        for (long i = 0; i < count; i++) to[i] = to_bf16(made[i]);
    };
    for_each_head(a.heads, all, contexts_of, w_uv, a.value, a.latent, store_values);
}

// cache: bf16 [slots of the cache, latent + rope], cache_stride apart; latents: bf16 [tokens, latent], latent_stride apart;
// keys: bf16 [tokens, rope], key_stride apart; slots: int64 [tokens], of which a negative one stores nothing.
void longcat_write_latents(bf16* cache, long cache_stride, const bf16* latents, long latent_stride, const bf16* keys,
                           long key_stride, const int64_t* slots, long tokens, long latent, long rope) {
    for (long t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        bf16* const to = cache + slots[t] * cache_stride;
        std::copy_n(latents + t * latent_stride, latent, to);
        std::copy_n(keys + t * key_stride, rope, to + latent);
    }
}
}
