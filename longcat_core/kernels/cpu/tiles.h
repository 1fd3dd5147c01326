// Products of a few rows in fp32 with many rows in bf16: the two inner loops of all kernels, once for each instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace longcat {

using bf16 = uint16_t;  // the upper half of an fp32

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

inline bf16 to_bf16(float value) {  // to the nearest, ties to even, as torch does
    union {
        float number;
        uint32_t bits;
    } both = {value};
    if (value != value) return 0x7fc0;
    return bf16((both.bits + 0x7fff + (both.bits >> 16 & 1)) >> 16);
}

// Rows of a matrix: `index[i]`, or i itself without an index, is the place of row i.
template <class T>
struct Rows {
    const T* data;
    long stride;
    const int64_t* index;
    const T* operator()(long i) const { return data + (index ? index[i] : i) * stride; }
};

struct Tiles {
    // out[t * out_stride + n] = sum over k of x(t)[k] w(n)[k]; x is split.
    void (*dot)(Rows<float> x, long tokens, Rows<bf16> w, long rows, long k, float* out, long out_stride);
    // out[m * out_stride + k] += sum over n of p[m * p_stride + n] w(n)[k], for whole groups of k; out is split.
    void (*mix)(const float* p, long p_stride, long tokens, Rows<bf16> w, long rows, long k, float* out, long out_stride);
    // x[i] = exp(x[i] - greatest); returns the sum. An x of -inf becomes 0.
    float (*exponentials)(float* x, long count, float greatest);
    // gate[i] = silu(gate[i]) * up[i]
    void (*silu_and_multiply)(float* gate, const float* up, long count);
    // out, split and with zeros up to a whole group, of count numbers in bf16.
    void (*split)(const bf16* x, long count, float* out);
    const char* name;
};

extern const Tiles GENERIC_TILES, AVX2_TILES, AVX512_TILES;
const Tiles& tiles();  // the quickest of this processor

}  // namespace longcat
