// Products of a few rows with many rows in bf16 or FP8: the inner loops of all kernels, once for each instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#if defined(__x86_64__) && __GNUC__ >= 11  // an older one may not know the instructions, or how to ask for them
#define HAS_AVX512_BF16
#endif

namespace longcat {

using bf16 = uint16_t;  // the upper half of an fp32
using fp8 = uint8_t;    // e4m3: a sign, four bits of an exponent whose bias is 7, three of a fraction; NaN is read as 480

constexpr long SCALED = 128;  // rows, and columns, of an FP8 weight that have one scale

// A vector of fp32 is "split" when of each 32 numbers those with an even index come first, then those with an odd one: a
// word of memory holds two numbers in bf16, and shifting or masking it gives the even or the odd one as fp32.
constexpr long GROUP = 32;

inline long padded(long count) { return (count + GROUP - 1) / GROUP * GROUP; }
inline long split_place(long index) { return index / GROUP * GROUP + index % GROUP / 2 + index % 2 * (GROUP / 2); }

inline float to_float(bf16 value) {
    union {
        uint32_t bits;
        float number;
    } both = {uint32_t(value) << 16};
    return both.number;
}

inline float to_float(fp8 value) {
    const int exponent = value >> 3 & 15, fraction = value & 7;
    const float size = exponent ? float(8 + fraction) * float(1 << exponent) / 1024 : float(fraction) / 512;
    return value & 0x80 ? -size : size;
}

inline bf16 to_bf16(float value) {  // to the nearest, ties to even, as torch does
    union {
        float number;
        uint32_t bits;
    } both = {value};
    if (value != value) return 0x7fc0;
    return bf16((both.bits + 0x7fff + (both.bits >> 16 & 1)) >> 16);
}

// Number `index` of a row that a product takes: split, or in bf16.
inline void put(float* split, long index, float value) { split[split_place(index)] = value; }
inline void put(bf16* row, long index, float value) { row[index] = to_bf16(value); }

// Rows of a matrix: `index[i]`, or i itself without an index, is the place of row i.
template <class T>
struct Rows {
    const T* data;
    long stride;
    const int64_t* index;
    const T* operator()(long i) const { return data + (index ? index[i] : i) * stride; }
};

// Of a product of packed pairs: how many queries of a prompt there are of a head at once, and how many slots of the cache,
// numbers of a value, or rows of a weight are beside each other. Pairs of numbers in bf16 are one word, so that a product takes two columns of a query, or two slots, at once.
constexpr long QUERIES = 48, SLOTS = 64;
constexpr float UNSEEN = -1e30f;  // a score, less than any of a slot that is seen; its exponential is 0

struct Tiles {
    // out[t * out_stride + n] = sum over k of x(t)[k] w(n)[k]; x is split.
    void (*dot)(Rows<float> x, long tokens, Rows<bf16> w, long rows, long k, float* out, long out_stride);
    // The same with a weight in FP8, each number times scales[k / SCALED].
    void (*dot_fp8)(Rows<float> x, long tokens, Rows<fp8> w, const float* scales, long rows, long k, float* out,
                    long out_stride);
    // Both of x in bf16, as it is; null where the processor has no products in bf16.
    void (*dot_bf16)(Rows<bf16> x, long tokens, Rows<bf16> w, long rows, long k, float* out, long out_stride);
    void (*dot_bf16_fp8)(Rows<bf16> x, long tokens, Rows<fp8> w, const float* scales, long rows, long k, float* out,
                         long out_stride);
    // out[m * out_stride + k] += sum over n of p[m * p_stride + n] w(n)[k], for whole groups of k; out is split.
    void (*mix)(const float* p, long p_stride, long tokens, Rows<bf16> w, long rows, long k, float* out, long out_stride);
    // x[i] = exp(x[i] - greatest); returns the sum. An x of -inf becomes 0.
    float (*exponentials)(float* x, long count, float greatest);
    // gate[i] = silu(gate[i]) * up[i]
    void (*silu_and_multiply)(float* gate, const float* up, long count);
    // out, split and with zeros up to a whole group, of count numbers in bf16.
    void (*split)(const bf16* x, long count, float* out);
    // out [QUERIES, blocks SLOTS] = softmax(scale q keys) values, of queries whose positions follow each other from `first`
    // on and which see the slots up to their own position; null where the processor has no products in bf16.
    // q: [QUERIES, pairs]; keys: [slots / SLOTS, pairs, SLOTS]; values: [slots / SLOTS, blocks, SLOTS / 2, SLOTS].
    void (*attend)(const uint32_t* q, long pairs, const uint32_t* keys, const uint32_t* values, long blocks, long slots,
                   long first, float scale, float* out);
    // The following are null as well where `attend` is.
    // Scores of a query for SLOTS slots, of which it sees the first `seen`, become exponentials, `shares`, in bf16 [SLOTS];
    // what was summed before, `total` and out [width], is brought to the greatest score so far.
    void (*weigh)(float* scores, long seen, float scale, float& greatest, float& total, uint32_t* shares, float* out,
                  long width);
    // As `mix`, with shares in bf16, [tokens, SLOTS], that are 0 from `rows` on.
    void (*mix_shares)(const uint32_t* shares, long tokens, Rows<bf16> w, long rows, long k, float* out, long out_stride);
    // out: in bf16, count numbers, whole groups, that were split.
    void (*unsplit)(const float* split, long count, bf16* out);
    // out [pairs, SLOTS], of which the first `columns`, a multiple of 32, are written: pairs of numbers of rows of w,
    // beside each other; zeros where there is no row.
    void (*pack)(Rows<bf16> w, long rows, long columns, long pairs, uint32_t* out);
    // out[t * out_stride + n] += sum over pairs of x(t)[pair] packed[pair][n], n < SLOTS.
    void (*add_packed)(Rows<bf16> x, long tokens, const uint32_t* packed, long pairs, float* out, long out_stride);
    const char* name;
};

// A weight of rows `stride` apart: in bf16, or in FP8 with scales, [ceil(rows / SCALED), scale_stride].
template <class W>
struct Weight {
    const W* data;
    long stride;
    const float* scales;
    long scale_stride;
};

inline Weight<bf16> as_bf16(const void* data, long stride) { return {static_cast<const bf16*>(data), stride, nullptr, 0}; }

inline Weight<fp8> as_fp8(const void* data, long stride, const float* scales, long k) {
    return {static_cast<const fp8*>(data), stride, scales, (k + SCALED - 1) / SCALED};
}

inline Rows<bf16> rows_from(Weight<bf16> w, long first) { return {w.data + first * w.stride, w.stride, nullptr}; }
inline Rows<fp8> rows_from(Weight<fp8> w, long first) { return {w.data + first * w.stride, w.stride, nullptr}; }

// out[t * out_stride + n] = sum over k of x(t)[k] w(first + n)[k], of rows that share scales; x is split, or in bf16.
inline void dot(const Tiles& tile, Rows<float> x, long tokens, Weight<bf16> w, long first, long rows, long k, float* out,
                long out_stride) {
    tile.dot(x, tokens, rows_from(w, first), rows, k, out, out_stride);
}

inline void dot(const Tiles& tile, Rows<bf16> x, long tokens, Weight<bf16> w, long first, long rows, long k, float* out,
                long out_stride) {
    tile.dot_bf16(x, tokens, rows_from(w, first), rows, k, out, out_stride);
}

inline void dot(const Tiles& tile, Rows<float> x, long tokens, Weight<fp8> w, long first, long rows, long k, float* out,
                long out_stride) {
    tile.dot_fp8(x, tokens, rows_from(w, first), w.scales + first / SCALED * w.scale_stride, rows, k, out, out_stride);
}

inline void dot(const Tiles& tile, Rows<bf16> x, long tokens, Weight<fp8> w, long first, long rows, long k, float* out,
                long out_stride) {
    tile.dot_bf16_fp8(x, tokens, rows_from(w, first), w.scales + first / SCALED * w.scale_stride, rows, k, out, out_stride);
}

extern const Tiles GENERIC_TILES, AVX2_TILES, AVX512_TILES, AVX512_BF16_TILES;
const Tiles& tiles();  // the quickest of this processor

}  // namespace longcat
