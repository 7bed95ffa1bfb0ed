// The sparse step on a CPU in float32. `core/native.py` compiles and loads this file, and says what each function does.
//
// A row of a result belongs to one thread, and is summed in one order, so that the number of threads changes no bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "rows.h"
#include "selection.h"

extern "C" {

// CSR by token -> by feature: counting sort, so that a feature's tokens stay in order.
void clt_by_feature(const i64 *indices, const i64 *offsets, i64 n_tokens, i64 n_features, i64 *order, i64 *tokens,
                    i64 *edges) {
    std::memset(edges, 0, (n_features + 1) * sizeof(i64));
    const i64 nnz = offsets[n_tokens];
    for (i64 e = 0; e < nnz; ++e) ++edges[indices[e] + 1];
    for (i64 i = 0; i < n_features; ++i) edges[i + 1] += edges[i];
    std::vector<i64> next(edges, edges + n_features);
    for (i64 b = 0; b < n_tokens; ++b)
        for (i64 e = offsets[b]; e < offsets[b + 1]; ++e) {
            const i64 place = next[indices[e]]++;
            order[place] = e;
            tokens[place] = b;
        }
}

void clt_bag(const i64 *indices, const i64 *offsets, i64 n_tokens, const float *values, const float *table, i64 n,
             float *out, i64 out_stride, i64 add, i64 n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (i64 b = 0; b < n_tokens; ++b) {
        float *y = out + b * out_stride;
        if (!add) std::memset(y, 0, n * sizeof(float));
        i64 e = offsets[b];
        const i64 end = offsets[b + 1];
        for (; e + 4 <= end; e += 4)
            add_rows(y, table + indices[e] * n, table + indices[e + 1] * n, table + indices[e + 2] * n,
                     table + indices[e + 3] * n, values[e], values[e + 1], values[e + 2], values[e + 3], n);
        for (; e < end; ++e) add_row(y, table + indices[e] * n, values[e], n);
    }
}

// Feature by feature, so that the table is read once and in order.
void clt_row_products(const i64 *order, const i64 *tokens, const i64 *edges, i64 n_features, const float *x,
                      i64 x_stride, const float *table, i64 n, float *out, i64 add, i64 n_threads) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(n_threads) if (n_threads > 1)
    for (i64 i = 0; i < n_features; ++i) {
        const float *w = table + i * n;
        const auto row = [&](i64 e) { return x + tokens[e] * x_stride; };
        const auto put = [&](i64 e, float product) { out[order[e]] = add ? out[order[e]] + product : product; };
        i64 e = edges[i];
        for (; e + 4 <= edges[i + 1]; e += 4) {
            float products[4];
            dots(w, row(e), row(e + 1), row(e + 2), row(e + 3), n, products);
            for (int j = 0; j < 4; ++j) put(e + j, products[j]);
        }
        for (; e < edges[i + 1]; ++e) put(e, dot(row(e), w, n));
    }
}

void clt_bag_of_tokens(const i64 *order, const i64 *tokens, const i64 *edges, i64 n_features, const float *weights,
                       const float *rows, i64 stride, i64 n_tokens, i64 n, float *out, i64 n_threads) {
    const Together here(order, edges[n_features], weights, rows, stride, n_tokens, n);
#pragma omp parallel for schedule(dynamic, 64) num_threads(n_threads) if (n_threads > 1)
    for (i64 i = 0; i < n_features; ++i)
        sum_tokens(out + i * n, true, tokens, edges[i], edges[i + 1], here.weights.data(), here.rows, here.stride, n);
}

// For each feature the product of its row with the sum of its tokens' rows, added to `out`. A block of columns at a time,
// copied so that it lies together: the rows of all tokens then stay in the second cache.
void clt_sum_products(const i64 *tokens, const i64 *edges, i64 n_features, const float *x, i64 x_stride, i64 n_tokens,
                      const float *table, i64 n, float *out, i64 n_threads) {
    std::vector<float> block(n_tokens * BLOCK);
    for (i64 start = 0; start < n; start += BLOCK) {
        const i64 width = std::min<i64>(BLOCK, n - start);
        for (i64 b = 0; b < n_tokens; ++b) std::copy_n(x + b * x_stride + start, width, block.data() + b * BLOCK);
#pragma omp parallel for schedule(dynamic, 64) num_threads(n_threads) if (n_threads > 1)
        for (i64 i = 0; i < n_features; ++i) {
            float sum[BLOCK];
            if (edges[i] == edges[i + 1]) continue;
            sum_block(sum, block.data(), tokens, edges[i], edges[i + 1]);
            out[i] += dot(sum, table + i * n + start, width);
        }
    }
}

// The k largest of each row above 0, by index, ties to the lowest; the rest of the k are value 0 at index 0.
void clt_topk(const float *h, i64 n_rows, i64 n, i64 stride, i64 k, float *values, i64 *indices, i64 n_threads) {
    const i64 groups = std::max<i64>(64, (4 * k + 31) / 32 * 32);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        std::vector<float> best(groups), space(n);
        std::vector<Candidate> found(n);
#pragma omp for schedule(static)
        for (i64 b = 0; b < n_rows; ++b) {
            const float *row = h + b * stride;
            const float bound = groups <= n ? bound_of(row, n, k, groups, best.data()) : 0;
            const i64 count = above(row, n, bound, false, found.data());
            const Cut cut = cut_of(found.data(), count, k, space.data());
            float *v = values + b * k;
            i64 *i = indices + b * k, ties = cut.ties, place = 0;
            for (i64 c = 0; c < count; ++c)
                if (cut.takes(found[c].value, ties)) {
                    v[place] = found[c].value;
                    i[place++] = found[c].index;
                }
            for (; place < k; ++place) {
                v[place] = 0;
                i[place] = 0;
            }
        }
    }
}

// The n largest above 0 of flat [size], ties to the lowest position: positions ascending, in `chosen` [n]. Candidates
// exceed 0.8 guess where n do, else 0. Returns how many were chosen; *smallest is the least of their values.
i64 clt_largest(const float *flat, i64 size, i64 n, float guess, i64 *chosen, float *smallest) {
    const i64 BLOCK = 4096;
    std::vector<Candidate> found, block(BLOCK);
    found.reserve(2 * n);
    for (int attempt = 0; attempt < 2; ++attempt) {
        const float bound = attempt || !(guess > 0) ? 0 : 0.8f * guess;
        found.clear();
        for (i64 start = 0; start < size; start += BLOCK) {
            const i64 count = above(flat + start, std::min(BLOCK, size - start), bound, true, block.data());
            for (i64 c = 0; c < count; ++c) found.push_back({block[c].value, start + block[c].index});
        }
        if ((i64)found.size() >= n || bound <= 0) break;
    }
    std::vector<float> space(found.size());
    const Cut cut = cut_of(found.data(), found.size(), n, space.data());
    i64 ties = cut.ties, place = 0;
    *smallest = 0;
    for (const Candidate &c : found)
        if (n > 0 && cut.takes(c.value, ties)) {
            if (!place || !(c.value >= *smallest)) *smallest = c.value;
            chosen[place++] = c.index;
        }
    return place;
}

// The pairs of a gate, CSR by token: active where h > theta, else beyond where h > theta - half. The rest of what is
// not above `low` (theta - half or a little less) is not looked at. n_found: how many of each. Of more than `most` active
// ones none are written, and those beyond not where both together are more.
void clt_gate(const float *h, i64 n_rows, i64 n, i64 stride, const float *theta, const float *low, float half, i64 most,
              i64 *active, float *values, i64 *active_offsets, i64 *beyond, i64 *beyond_offsets, i64 *n_found,
              i64 n_threads) {
    static thread_local std::vector<GatePart> kept;  // fresh memory for it at each call took half of the time
    std::vector<GatePart> &parts = kept;
    if ((i64)parts.size() < n_threads) parts.resize(n_threads);
    for (GatePart &part : parts) part.n_active = part.n_beyond = 0;
    active_offsets[0] = beyond_offsets[0] = 0;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (i64 t = 0; t < n_threads; ++t)
        for (i64 b = n_rows * t / n_threads; b < n_rows * (t + 1) / n_threads; ++b) {
            const i64 n_active = parts[t].n_active, n_beyond = parts[t].n_beyond;
            parts[t].row(h + b * stride, n, theta, low, half);
            active_offsets[b + 1] = parts[t].n_active - n_active;
            beyond_offsets[b + 1] = parts[t].n_beyond - n_beyond;
        }
    for (i64 b = 0; b < n_rows; ++b) {
        active_offsets[b + 1] += active_offsets[b];
        beyond_offsets[b + 1] += beyond_offsets[b];
    }
    n_found[0] = active_offsets[n_rows];
    n_found[1] = beyond_offsets[n_rows];
    for (const GatePart &part : parts) {
        if (n_found[0] <= most) {
            active = std::copy_n(part.active.data(), part.n_active, active);
            values = std::copy_n(part.values.data(), part.n_active, values);
        }
        if (n_found[0] + n_found[1] <= most) beyond = std::copy_n(part.beyond.data(), part.n_beyond, beyond);
    }
}

struct Term {
    const i64 *order, *tokens, *edges;
    const float *weights, *rows;
    i64 stride, n_tokens;
};

// torch.optim.Adam on w [n_features, n] with the gradient sum of the terms + grad (which may be null). With
// `decoupled` the decay shrinks w itself (AdamW), else it adds to the gradient.
void clt_adam(float *w, float *m, float *v, i64 n_features, i64 n, const float *grad, const Term *terms, i64 n_terms,
              double lr, double beta1, double beta2, double eps, double decay, i64 decoupled, double step,
              i64 n_threads) {
    const float b1 = beta1, b2 = beta2, to_m = 1 - beta1, to_v = 1 - beta2, tiny = eps;
    const float step_size = lr / (1 - std::pow(beta1, step)), root = 1 / std::sqrt(1 - std::pow(beta2, step));
    const float keep = decoupled ? 1 - lr * decay : 1, pull = decoupled ? 0 : decay;
    std::vector<Together> lying;
    for (const Term *t = terms; t < terms + n_terms; ++t)
        lying.emplace_back(t->order, t->edges[n_features], t->weights, t->rows, t->stride, t->n_tokens, n);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        std::vector<float> sum(n);
#pragma omp for schedule(dynamic, 64)
        for (i64 i = 0; i < n_features; ++i) {
            float *__restrict wi = w + i * n, *__restrict mi = m + i * n, *__restrict vi = v + i * n;
            float *__restrict g = sum.data();
            if (grad) std::memcpy(g, grad + i * n, n * sizeof(float));
            bool fresh = !grad;
            for (i64 t = 0; t < n_terms; ++t, fresh = false)
                sum_tokens(g, fresh, terms[t].tokens, terms[t].edges[i], terms[t].edges[i + 1],
                           lying[t].weights.data(), lying[t].rows, lying[t].stride, n);
            if (fresh) std::memset(g, 0, n * sizeof(float));
            for (i64 d = 0; d < n; ++d) {
                const float weight = wi[d] * keep, gd = g[d] + pull * weight;
                // As torch interpolates: from the nearer end.
                const float md = to_m < 0.5f ? mi[d] + to_m * (gd - mi[d]) : gd - b1 * (gd - mi[d]);
                const float vd = b2 * vi[d] + to_v * gd * gd;
                mi[d] = md;
                vi[d] = vd;
                wi[d] = weight - step_size * md / (std::sqrt(vd) * root + tiny);
            }
        }
    }
}

}  // extern "C"
