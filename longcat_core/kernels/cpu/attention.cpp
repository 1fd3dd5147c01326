// MLA over a paged latent cache, in latent space: decoding and verification of a group of requests.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

using namespace longcat;

static constexpr long BLOCK = 64;  // rows of a weight, or slots of the cache; a multiple of GROUP
static constexpr long ROWS = 64;   // of queries, one for each head, that a block of slots is read for at once
static_assert(BLOCK == SLOTS, "a block is what `weigh` takes");

// store(n, h, first, sums), with sums[i] = x(h)(n) w(h)[first + i], for each head h and each of `all` rows of x(h), for a
// block of the weight's rows after the other; w: bf16 [heads, rows, k].
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

// How many parts the slots of a request are attended to in, and how many heads at once, so that threads have enough to do.
static long parts_of(const Attention& a) {
    return std::max(1L, std::min((2 * omp_get_max_threads() + a.requests - 1) / a.requests, a.longest / 512));
}

static long heads_at_once(const Attention& a, long parts) {
    long heads = std::min(a.heads, ROWS);
    while (heads > 4 && a.requests * parts * ((a.heads + heads - 1) / heads) < omp_get_max_threads()) heads = (heads + 1) / 2;
    return heads;
}

// A query in latent space, as a product takes it.
static void put_block(float* split, long first, long count, const float* made) {
    for (long group = first; group < first + count; group += GROUP)
        for (long i = 0; i < GROUP / 2; i++) {
            split[group + i] = made[group - first + 2 * i];
            split[group + GROUP / 2 + i] = made[group - first + 2 * i + 1];
        }
}

static void put_block(bf16* row, long first, long count, const float* made) {
    for (long i = 0; i < count; i++) row[first + i] = to_bf16(made[i]);
}

namespace {
// Some queries, all with `heads` rows, and slots that all of them see, or those that `visible`, [queries, BLOCK], says.
struct Block {
    long queries, heads, count;
    Rows<bf16> keys;
    const bool* visible;
};
}  // namespace

// Adds the block to contexts, `kept` apart: [latent] numbers, split, then the greatest score and the sum of exponentials.
static void add_block(const Attention& a, const float* q, long width, const Block& block, float* to, long kept) {
    const Tiles& tile = tiles();
    const long rows = block.queries * block.heads, count = block.count;
    const std::unique_ptr<float[]> weights(new float[rows * BLOCK]);
    tile.dot({q, width, nullptr}, rows, block.keys, count, a.latent + a.rope, weights.get(), BLOCK);
    for (long row = 0; row < rows; row++) {
        float* const scores = weights.get() + row * BLOCK;
        const bool* const visible = block.visible ? block.visible + row / block.heads * BLOCK : nullptr;
        for (long i = 0; i < count; i++) scores[i] = !visible || visible[i] ? scores[i] * a.scale : -INFINITY;
        float* const context = to + row * kept;
        float &greatest = context[a.latent], &total = context[a.latent + 1];
        const float now = std::max(greatest, *std::max_element(scores, scores + count));
        if (now == -INFINITY) {  // nothing is seen yet
            std::fill_n(scores, count, 0.0f);
            continue;
        }
        const float shrink = std::exp(greatest - now);
        if (shrink != 1.0f)
            for (long i = 0; i < a.latent; i++) context[i] *= shrink;
        greatest = now;
        total = total * shrink + tile.exponentials(scores, count, now);
    }
    tile.mix(weights.get(), BLOCK, rows, block.keys, count, a.latent, to, kept);
}

static void add_block(const Attention& a, const bf16* q, long width, const Block& block, float* to, long kept) {
    const Tiles& tile = tiles();
    const long rows = block.queries * block.heads;
    const std::unique_ptr<float[]> weights(new float[rows * SLOTS]);
    const std::unique_ptr<uint32_t[]> shares(new uint32_t[rows * SLOTS / 2]);
    tile.dot_bf16({q, width, nullptr}, rows, block.keys, block.count, a.latent + a.rope, weights.get(), SLOTS);
    for (long row = 0; row < rows; row++) {
        float* const scores = weights.get() + row * SLOTS;
        uint32_t* const of_row = shares.get() + row * SLOTS / 2;
        float* const context = to + row * kept;
        if (block.visible) {
            const bool* const visible = block.visible + row / block.heads * BLOCK;
            if (std::none_of(visible, visible + block.count, [](bool is_visible) { return is_visible; })) {
                std::fill_n(of_row, SLOTS / 2, 0u);
                continue;
            }
            for (long i = 0; i < block.count; i++)
                if (!visible[i]) scores[i] = UNSEEN;
        }
        tile.weigh(scores, block.count, a.scale, context[a.latent], context[a.latent + 1], of_row, context, a.latent);
    }
    tile.mix_shares(shares.get(), rows, block.keys, block.count, a.latent, to, kept);
}

// Contexts of parts become one, of all slots, in the place of the first; a part is `part_stride` after the one before.
static void join_parts(const Attention& a, float* contexts, long parts, long part_stride) {
    float greatest = -INFINITY, total = 0.0f;
    for (long part = 0; part < parts; part++) greatest = std::max(greatest, contexts[part * part_stride + a.latent]);
    for (long part = 0; part < parts; part++) {
        const float* const from = contexts + part * part_stride;
        total += from[a.latent + 1] * std::exp(from[a.latent] - greatest);
    }
    for (long part = 0; part < parts; part++) {
        const float* const from = contexts + part * part_stride;
        const float share = std::exp(from[a.latent] - greatest) / total;
        if (part == 0)
            for (long i = 0; i < a.latent; i++) contexts[i] *= share;
        else
            for (long i = 0; i < a.latent; i++) contexts[i] += share * from[i];
    }
}

// Where in the cache `count` tokens of a request are, from its token `first` on.
static void put_slots(int64_t* slots, const Group& group, long request, long first, long count) {
    const int32_t* block = group.table + group.table_rows[request] * group.table_stride + first / group.block_size;
    for (long i = 0, within = first % group.block_size; i < count; i++) {
        slots[i] = int64_t(*block) * group.block_size + within;
        if (++within == group.block_size) within = 0, block++;
    }
}

// X: what queries and contexts are multiplied with weights and the cache as.
template <class X>
static void attend(const Group& group, bf16* output, const bf16* query, const bf16* cache, const bf16* w_uk,
                   const bf16* w_uv, float* scratch) {
    const Attention& a = group.attention;
    constexpr bool IS_BF16 = sizeof(X) == sizeof(bf16);
    const Tiles& tile = tiles();
    const long all = a.requests * a.queries, width = padded(a.latent + a.rope), nope_width = padded(a.nope);
    const long parts = parts_of(a), heads = heads_at_once(a, parts), head_blocks = (a.heads + heads - 1) / heads;
    const long kept = a.latent + 2;  // a context with its greatest score and its sum of exponentials
    const long part_stride = all * a.heads * kept;
    float* const contexts = scratch;
    X* const in_latent = reinterpret_cast<X*>(contexts + parts * part_stride);
    X* const more = in_latent + all * a.heads * width;  // queries without their rotary part, or contexts
    const std::unique_ptr<int64_t[]> rows(new int64_t[all]);
    for (long n = 0; n < all; n++) rows[n] = group.starts[n / a.queries] + n % a.queries;
    const int64_t* const row_of = rows.get();

    // Queries into latent space, a head at a time, for all requests.
    for_each(all * a.heads, [=, &tile](long item) {
        const long n = item / a.heads, h = item % a.heads;
        const bf16* const from = query + row_of[n] * a.query_stride + h * (a.nope + a.rope);
        if constexpr (!IS_BF16) tile.split(from, a.nope, more + item * nope_width);
        X* const to = in_latent + item * width;
        for (long i = 0; i < a.rope; i++) put(to, a.latent + i, to_float(from[a.nope + i]));
        for (long i = a.latent + a.rope; i < width; i++) put(to, i, 0.0f);
    });
    const auto queries_of = [=](long h) -> Rows<X> {
        if constexpr (IS_BF16)
            return {query + h * (a.nope + a.rope), a.query_stride, row_of};
        else
            return {more + h * nope_width, a.heads * nope_width, nullptr};
    };
    const auto store = [=](long n, long h, long first, long count, const float* made) {
        put_block(in_latent + (n * a.heads + h) * width, first, count, made);
    };
    for_each_head(a.heads, all, queries_of, w_uk, a.latent, a.nope, store);

    // Contexts of some heads of a request over a part of its slots, a block of slots at a time.
    const long part_slots = ((a.longest + parts - 1) / parts + BLOCK - 1) / BLOCK * BLOCK;
    for_each(a.requests * parts * head_blocks, [=, &a, &group](long item) {
        const long request = item / (parts * head_blocks), part = item / head_blocks % parts;
        const long first_head = item % head_blocks * heads, some = std::min(heads, a.heads - first_head);
        const long length = group.lengths[request], before = length - a.queries;  // slots that all queries see
        const long last = std::min(length, (part + 1) * part_slots);
        const long together = some == a.heads ? std::max(1L, ROWS / some) : 1;  // queries whose rows follow each other
        for (long q = 0; q < a.queries; q += together) {
            const long queries = std::min(together, a.queries - q), row = (request * a.queries + q) * a.heads + first_head;
            float* const to = contexts + part * part_stride + row * kept;
            for (long i = 0; i < queries * some; i++) {
                std::fill_n(to + i * kept, a.latent, 0.0f);
                to[i * kept + a.latent] = -INFINITY, to[i * kept + a.latent + 1] = 0.0f;
            }
            for (long first = part * part_slots; first < last; first += BLOCK) {
                const long count = std::min(BLOCK, last - first);
                int64_t slots[BLOCK];
                put_slots(slots, group, request, first, count);
                const Rows<bf16> keys = {cache, a.cache_stride, slots};
                const auto add = [&](long from, long some_queries, long seen, const bool* visible) {
                    add_block(a, in_latent + (row + from * some) * width, width, {some_queries, some, seen, keys, visible},
                              to + from * some * kept, kept);
                };
                if (group.trees && first + count > before) {
                    bool visible[ROWS * BLOCK];
                    for (long i = 0; i < queries; i++) {
                        const bool* const nodes = group.trees + (request * a.queries + q + i) * a.queries;
                        for (long slot = 0; slot < count; slot++)
                            visible[i * BLOCK + slot] = first + slot < before || nodes[first + slot - before];
                    }
                    add(0, queries, count, visible);
                    continue;
                }
                const auto seen_by = [=](long i) { return std::min(count, before + q + i + 1 - first); };
                for (long i = 0, next; i < queries; i = next) {
                    const long seen = seen_by(i);
                    for (next = i + 1; next < queries && seen_by(next) == seen;) next++;
                    if (seen > 0) add(i, next - i, seen, nullptr);
                }
            }
        }
    });

    // The parts put together, and values out of latent space, a head at a time, for all requests.
    for_each(all * a.heads, [=, &tile](long item) {
        join_parts(a, contexts + item * kept, parts, part_stride);
        if constexpr (IS_BF16) tile.unsplit(contexts + item * kept, a.latent, more + item * a.latent);
    });
    const auto contexts_of = [=](long h) -> Rows<X> {
        if constexpr (IS_BF16)
            return {more + h * a.latent, a.heads * a.latent, nullptr};
        else
            return {contexts + h * kept, a.heads * kept, nullptr};
    };
    const auto store_values = [=](long n, long h, long first, long count, const float* made) {
        bf16* const to = output + (row_of[n] * a.heads + h) * a.value + first;
        for (long i = 0; i < count; i++) to[i] = to_bf16(made[i]);
    };
    for_each_head(a.heads, all, contexts_of, w_uv, a.value, a.latent, store_values);
}

extern "C" {

// How many fp32 `longcat_attention` needs as its scratch.
long longcat_attention_scratch(const Attention* a) {
    return a->requests * a->queries * a->heads *
           (parts_of(*a) * (a->latent + 2) + padded(a->latent + a->rope) + std::max(padded(a->nope), a->latent));
}

// output: bf16 [T, heads, value], of which the rows of the group's queries are written; query: bf16 [T, heads, nope + rope];
// cache: bf16 [slots of the cache, latent + rope]; w_uk: bf16 [heads, latent, nope]; w_uv: bf16 [heads, value, latent];
// latent is a multiple of 32. scratch: fp32, as many as `longcat_attention_scratch` says. Where the processor has products
// in bf16, queries in latent space, what softmax makes of scores, and contexts are rounded to bf16, as kernels for GPUs do;
// sums are fp32.
void longcat_attention(const Group* group, bf16* output, const bf16* query, const bf16* cache, const bf16* w_uk,
                       const bf16* w_uv, float* scratch) {
    (tiles().dot_bf16 ? attend<bf16> : attend<float>)(*group, output, query, cache, w_uk, w_uv, scratch);
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
