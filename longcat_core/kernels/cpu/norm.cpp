// RMSNorm of rows, alone or of the sum with a residual.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "parallel.h"

using namespace longcat;

// output[i] = value(i) * weight[i] over the root of the mean square; also calls summed(i, value(i)) once for each i.
template <class Value, class Summed>
static void norm_row(bf16* output, const bf16* weight, float epsilon, long columns, Value value, Summed summed) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < columns; i++) squares += value(i) * value(i);
    const float scale = 1.0f / std::sqrt(squares / columns + epsilon);
#pragma omp simd
    for (long i = 0; i < columns; i++) {
        const float made = value(i);
        summed(i, made);
        output[i] = to_bf16(made * scale * to_float(weight[i]));
    }
}

extern "C" {

// output: bf16 [rows, columns]; x: bf16 [rows, columns], rows x_stride apart; residual: null, or bf16 [rows, columns], rows
// residual_stride apart; then x + residual is what is normed, and is also written to sum: bf16 [rows, columns].
void longcat_rms_norm(bf16* output, bf16* sum, const bf16* x, long x_stride, const bf16* residual, long residual_stride,
                      const bf16* weight, float epsilon, long rows, long columns) {
    const long at_once = std::max(1L, WORTH_A_THREAD / columns), blocks = (rows + at_once - 1) / at_once;
    for_each(blocks, [=](long block) {
        for (long row = block * at_once; row < std::min(rows, (block + 1) * at_once); row++) {
            const bf16* const from = x + row * x_stride;
            bf16* const to = output + row * columns;
            if (residual) {
                const bf16* const other = residual + row * residual_stride;
                bf16* const both = sum + row * columns;
                norm_row(
                    to, weight, epsilon, columns, [=](long i) { return to_float(from[i]) + to_float(other[i]); },
                    [=](long i, float made) { both[i] = to_bf16(made); });
            } else
                norm_row(
                    to, weight, epsilon, columns, [=](long i) { return to_float(from[i]); }, [](long, float) {});
        }
    });
}
}
