// Sums and products of rows, for kernels.cpp.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

typedef int64_t i64;

namespace {

const int LANES = 32;  // independent partial sums of a dot product

// y += a * x
inline void add_row(float *__restrict y, const float *__restrict x, float a, i64 n) {
    for (i64 d = 0; d < n; ++d) y[d] += a * x[d];
}

inline void set_row(float *__restrict y, const float *__restrict x, float a, i64 n) {
    for (i64 d = 0; d < n; ++d) y[d] = a * x[d];
}

// Four rows at once: as many streams from memory, and a quarter of the traffic on y.
inline void add_rows(float *__restrict y, const float *x0, const float *x1, const float *x2, const float *x3, float a0,
                     float a1, float a2, float a3, i64 n) {
    for (i64 d = 0; d < n; ++d) y[d] += a0 * x0[d] + a1 * x1[d] + a2 * x2[d] + a3 * x3[d];
}

inline float dot(const float *__restrict x, const float *__restrict y, i64 n) {
    float part[LANES] = {0};
    i64 d = 0;
    for (; d + LANES <= n; d += LANES)
        for (int j = 0; j < LANES; ++j) part[j] += x[d + j] * y[d + j];
    for (int j = 0; d < n; ++d, ++j) part[j] += x[d] * y[d];
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; ++j) part[j] += part[j + width];
    return part[0];
}

// y = [y +] sum over entries begin..end of weights[e] * rows[tokens[e]]
inline void sum_tokens(float *y, bool fresh, const i64 *tokens, i64 begin, i64 end, const float *weights,
                       const float *rows, i64 stride, i64 n) {
    const auto row = [&](i64 e) { return rows + tokens[e] * stride; };
    i64 e = begin;
    if (fresh) {
        if (e == end) {
            std::memset(y, 0, n * sizeof(float));
            return;
        }
        set_row(y, row(e), weights[e], n);
        ++e;
    }
    for (; e + 4 <= end; e += 4)
        add_rows(y, row(e), row(e + 1), row(e + 2), row(e + 3), weights[e], weights[e + 1], weights[e + 2],
                 weights[e + 3], n);
    for (; e < end; ++e) add_row(y, row(e), weights[e], n);
}

// Weights in the order of their features, and rows side by side: what is read many times lies together.
struct Together {
    std::vector<float> weights, copied;
    const float *rows;
    i64 stride;

    Together(const i64 *order, i64 nnz, const float *scattered, const float *x, i64 x_stride, i64 n_tokens, i64 n)
        : weights(nnz), rows(x), stride(x_stride) {
        for (i64 e = 0; e < nnz; ++e) weights[e] = scattered[order[e]];
        if (stride == n) return;
        // Rows that lie a power of two apart share a few places of the cache.
        copied.resize(n_tokens * n);
        for (i64 b = 0; b < n_tokens; ++b) std::memcpy(copied.data() + b * n, x + b * x_stride, n * sizeof(float));
        rows = copied.data();
        stride = n;
    }
};

// 8 floats that may lie anywhere; the compiler splits what the processor has no room for.
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));

inline Vec vec(const float *x) { return *(const Vec *)x; }

inline float total(Vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// products[j] = x_j . w: four at once, so that w is read once and no sum waits for another.
inline void dots(const float *w, const float *x0, const float *x1, const float *x2, const float *x3, i64 n,
                 float *products) {
    Vec a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0};
    i64 d = 0;
    for (; d + 16 <= n; d += 16) {
        const Vec low = vec(w + d), high = vec(w + d + 8);
        a0 += low * vec(x0 + d), b0 += high * vec(x0 + d + 8);
        a1 += low * vec(x1 + d), b1 += high * vec(x1 + d + 8);
        a2 += low * vec(x2 + d), b2 += high * vec(x2 + d + 8);
        a3 += low * vec(x3 + d), b3 += high * vec(x3 + d + 8);
    }
    products[0] = total(a0 + b0), products[1] = total(a1 + b1);
    products[2] = total(a2 + b2), products[3] = total(a3 + b3);
    for (; d < n; ++d) {
        products[0] += w[d] * x0[d], products[1] += w[d] * x1[d];
        products[2] += w[d] * x2[d], products[3] += w[d] * x3[d];
    }
}

const int BLOCK = 64;  // columns whose sum lies in registers

// y[0..BLOCK) = sum of the tokens' rows of x, which are BLOCK long.
inline void sum_block(float *y, const float *x, const i64 *tokens, i64 begin, i64 end) {
    Vec sum[BLOCK / 8] = {};
    for (i64 e = begin; e < end; ++e)
        for (int j = 0; j < BLOCK / 8; ++j) sum[j] += vec(x + tokens[e] * BLOCK + 8 * j);
    std::memcpy(y, sum, sizeof sum);
}

}  // namespace
