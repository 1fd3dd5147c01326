// Attention of a prompt, or a part of one, over keys and values that were expanded from the latents of its request.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"

using namespace longcat;

static long blocks_of(long count) { return (count + SLOTS - 1) / SLOTS; }
static long pairs_of(const Prompt& p) { return (p.nope + p.rope) / 2; }

static constexpr bf16 ZEROS[SLOTS] = {};

extern "C" {

// How many words `longcat_prompt` needs as its scratch: 0 if it is not for this processor, or not for these sizes.
long longcat_prompt_scratch(const Prompt* p) {
    if (!tiles().attend || p->nope % 2 || p->rope % 2) return 0;
    return p->heads * blocks_of(p->slots) * SLOTS * (pairs_of(*p) + blocks_of(p->value) * SLOTS / 2);
}

// output: bf16, `value` numbers for each head, of a token `output_stride` after the one before; query: bf16, nope + rope
// numbers for each head, of a token `query_stride` after the one before; these tokens have the last of the positions;
// expanded: bf16 [slots, heads, nope + value]; rope_keys: bf16 [slots, rope], `rope_stride` apart; nope and rope are even.
void longcat_prompt(const Prompt* prompt, bf16* output, const bf16* query, const bf16* expanded, const bf16* rope_keys,
                    uint32_t* scratch) {
    const Prompt p = *prompt;
    const long pairs = pairs_of(p), blocks = blocks_of(p.slots), value_blocks = blocks_of(p.value);
    const long row = p.heads * (p.nope + p.value), keys_of_block = pairs * SLOTS;
    const long values_of_block = value_blocks * SLOTS * SLOTS / 2;
    uint32_t* const all_keys = scratch;
    uint32_t* const all_values = scratch + p.heads * blocks * keys_of_block;

    // Keys with the slots of a block beside each other, values with those of a pair of slots in one word.
    for_each(p.heads * blocks, [=](long item) {
        const long h = item / blocks, first = item % blocks * SLOTS, count = std::min(SLOTS, p.slots - first);
        const bf16* const from = expanded + first * row + h * (p.nope + p.value);
        uint32_t* const keys = all_keys + item * keys_of_block;
        tiles().pack({from, row, nullptr}, count, SLOTS, p.nope / 2, keys);
        tiles().pack({rope_keys + first * p.rope_stride, p.rope_stride, nullptr}, count, SLOTS, p.rope / 2,
                     keys + p.nope / 2 * SLOTS);
        for (long block = 0; block < value_blocks; block++) {
            uint32_t* const values = all_values + item * values_of_block + block * SLOTS * SLOTS / 2;
            const long columns = std::min(SLOTS, p.value - block * SLOTS);
            std::fill_n(values, SLOTS * SLOTS / 2, 0u);
            for (long i = 0; i < count; i += 2) {
                const bf16* const first_value = from + i * row + p.nope + block * SLOTS;
                const bf16* const second_value = i + 1 < count ? first_value + row : ZEROS;
                uint32_t* const to = values + i / 2 * SLOTS;
                for (long j = 0; j < columns; j++) to[j] = first_value[j] | uint32_t(second_value[j]) << 16;
            }
        }
    });

    const long parts = (p.queries + QUERIES - 1) / QUERIES;
    for_each(p.heads * parts, [=](long item) {
        const long h = item % p.heads, first = (parts - 1 - item / p.heads) * QUERIES;  // the longest ones first
        const long count = std::min(QUERIES, p.queries - first);
        std::vector<uint32_t> q(QUERIES * pairs);
        std::vector<float> made(QUERIES * value_blocks * SLOTS);
        for (long i = 0; i < count; i++)
            std::memcpy(q.data() + i * pairs, query + (first + i) * p.query_stride + h * 2 * pairs, pairs * sizeof(uint32_t));
        tiles().attend(q.data(), pairs, all_keys + h * blocks * keys_of_block, all_values + h * blocks * values_of_block,
                       value_blocks, p.slots, p.slots - p.queries + first, p.scale, made.data());
        for (long i = 0; i < count; i++) {
            bf16* const to = output + (first + i) * p.output_stride + h * p.value;
            for (long j = 0; j < p.value; j++) to[j] = to_bf16(made[i * value_blocks * SLOTS + j]);
        }
    });
}
}
