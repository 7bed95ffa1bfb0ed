// The sparse step on a CPU in float32. `core/native.py` compiles and loads this file, and says what each function does.
//
// A row of a result belongs to one thread, and is summed in one order, so that the number of threads changes no bit.
// Comparisons are written so that a NaN counts as large: it is chosen, and the loss shows it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
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

// y = [y +] sum over entries begin..end of weights[order[e]] * rows[tokens[e]]
inline void sum_tokens(float *y, bool fresh, const i64 *order, const i64 *tokens, i64 begin, i64 end,
                       const float *weights, const float *rows, i64 stride, i64 n) {
    i64 e = begin;
    if (fresh) {
        if (e == end) {
            std::memset(y, 0, n * sizeof(float));
            return;
        }
        set_row(y, rows + tokens[e] * stride, weights[order[e]], n);
        ++e;
    }
    for (; e + 4 <= end; e += 4)
        add_rows(y, rows + tokens[e] * stride, rows + tokens[e + 1] * stride, rows + tokens[e + 2] * stride,
                 rows + tokens[e + 3] * stride, weights[order[e]], weights[order[e + 1]], weights[order[e + 2]],
                 weights[order[e + 3]], n);
    for (; e < end; ++e) add_row(y, rows + tokens[e] * stride, weights[order[e]], n);
}

struct Candidate {
    float value;
    i64 index;
};

// Larger values first, a NaN before all, then lower indices.
inline bool before(const Candidate &a, const Candidate &b) {
    bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan || b_nan) return a_nan != b_nan ? a_nan : a.index < b.index;
    return a.value != b.value ? a.value > b.value : a.index < b.index;
}

inline bool larger(float a, float b) { return b == b && !(a <= b); }

// A bound that at least k values reach: the k-th largest of the maxima of `groups` interleaved groups, at least 0.
float bound_of(const float *h, i64 n, i64 k, i64 groups, float *best, float *sorted) {
    for (i64 j = 0; j < groups; ++j) best[j] = h[j];
    i64 d = groups;
    for (; d + groups <= n; d += groups)
        for (i64 j = 0; j < groups; ++j) best[j] = h[d + j] > best[j] ? h[d + j] : best[j];
    for (i64 j = 0; j < groups; ++j) sorted[j] = best[j] > 0 ? best[j] : 0;  // a NaN is no bound
    std::nth_element(sorted, sorted + k - 1, sorted + groups, [](float a, float b) { return a > b; });
    return sorted[k - 1];
}

}  // namespace

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
    for (i64 i = 0; i < n_features; ++i)
        for (i64 e = edges[i]; e < edges[i + 1]; ++e) {
            const float product = dot(x + tokens[e] * x_stride, table + i * n, n);
            out[order[e]] = add ? out[order[e]] + product : product;
        }
}

void clt_bag_of_tokens(const i64 *order, const i64 *tokens, const i64 *edges, i64 n_features, const float *weights,
                       const float *rows, i64 stride, i64 n, float *out, i64 n_threads) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(n_threads) if (n_threads > 1)
    for (i64 i = 0; i < n_features; ++i)
        sum_tokens(out + i * n, true, order, tokens, edges[i], edges[i + 1], weights, rows, stride, n);
}

// The k largest of each row above 0, descending, ties to the lowest index; the rest of the k are value 0 at index 0.
void clt_topk(const float *h, i64 n_rows, i64 n, i64 stride, i64 k, float *values, i64 *indices, i64 n_threads) {
    const i64 groups = std::max<i64>(64, (4 * k + 31) / 32 * 32);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        std::vector<float> best(groups), sorted(groups);
        std::vector<Candidate> found;
#pragma omp for schedule(static)
        for (i64 b = 0; b < n_rows; ++b) {
            const float *row = h + b * stride;
            const float bound = groups <= n ? bound_of(row, n, k, groups, best.data(), sorted.data()) : 0;
            found.clear();
            i64 d = 0;
            for (; d + 32 <= n; d += 32) {
                int any = 0;
                for (int j = 0; j < 32; ++j) any |= !(row[d + j] < bound);
                if (any)
                    for (int j = 0; j < 32; ++j)
                        if (!(row[d + j] < bound) && !(row[d + j] <= 0)) found.push_back({row[d + j], d + j});
            }
            for (; d < n; ++d)
                if (!(row[d] < bound) && !(row[d] <= 0)) found.push_back({row[d], d});
            const i64 taken = std::min<i64>(k, found.size());
            if ((i64)found.size() > 4 * k) {
                std::nth_element(found.begin(), found.begin() + (taken - 1), found.end(), before);
                std::sort(found.begin(), found.begin() + taken, before);
            } else {
                std::partial_sort(found.begin(), found.begin() + taken, found.end(), before);
            }
            for (i64 j = 0; j < k; ++j) {
                values[b * k + j] = j < taken ? found[j].value : 0;
                indices[b * k + j] = j < taken ? found[j].index : 0;
            }
        }
    }
}

// The n largest above 0 of flat [size], ties to the lowest position: positions ascending, in `chosen` [n]. Candidates
// exceed 0.8 guess where n do, else 0. Returns how many were chosen; *smallest is the least of their values.
i64 clt_largest(const float *flat, i64 size, i64 n, float guess, i64 *chosen, float *smallest) {
    std::vector<Candidate> found;
    found.reserve(2 * n);
    for (int attempt = 0; attempt < 2; ++attempt) {
        const float bound = attempt || !(guess > 0) ? 0 : 0.8f * guess;
        found.clear();
        i64 d = 0;
        for (; d + 32 <= size; d += 32) {
            int any = 0;
            for (int j = 0; j < 32; ++j) any |= !(flat[d + j] <= bound);
            if (any)
                for (int j = 0; j < 32; ++j)
                    if (!(flat[d + j] <= bound)) found.push_back({flat[d + j], d + j});
        }
        for (; d < size; ++d)
            if (!(flat[d] <= bound)) found.push_back({flat[d], d});
        if ((i64)found.size() >= n || bound <= 0) break;
    }
    *smallest = 0;
    if (n <= 0 || found.empty()) return 0;
    const i64 taken = std::min<i64>(n, found.size());
    Candidate cut = {-INFINITY, -1};
    if ((i64)found.size() > n) {
        std::vector<float> values(found.size());
        for (size_t j = 0; j < found.size(); ++j) values[j] = found[j].value;
        auto descending = [](float a, float b) { return a != a ? b == b : a > b; };
        std::nth_element(values.begin(), values.begin() + (n - 1), values.end(), descending);
        cut.value = values[n - 1];
        i64 above = 0;
        for (const Candidate &c : found) above += larger(c.value, cut.value);
        i64 ties = n - above, place = 0;
        for (const Candidate &c : found) {
            const bool tie = c.value == cut.value || (c.value != c.value && cut.value != cut.value);
            if (larger(c.value, cut.value) || (tie && ties-- > 0)) chosen[place++] = c.index;
        }
        *smallest = cut.value;
        return place;
    }
    float least = found[0].value;
    for (i64 j = 0; j < taken; ++j) {
        chosen[j] = found[j].index;
        if (!(found[j].value >= least)) least = found[j].value;
    }
    *smallest = least;
    return taken;
}

struct Term {
    const i64 *order, *tokens, *edges;
    const float *weights, *rows;
    i64 stride;
};

// torch.optim.Adam on w [n_features, n] with the gradient sum of the terms + grad (which may be null). With
// `decoupled` the decay shrinks w itself (AdamW), else it adds to the gradient.
void clt_adam(float *w, float *m, float *v, i64 n_features, i64 n, const float *grad, const Term *terms, i64 n_terms,
              double lr, double beta1, double beta2, double eps, double decay, i64 decoupled, double step,
              i64 n_threads) {
    const float b1 = beta1, b2 = beta2, to_m = 1 - beta1, to_v = 1 - beta2, tiny = eps;
    const float step_size = lr / (1 - std::pow(beta1, step)), root = 1 / std::sqrt(1 - std::pow(beta2, step));
    const float keep = decoupled ? 1 - lr * decay : 1, pull = decoupled ? 0 : decay;
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
                sum_tokens(g, fresh, terms[t].order, terms[t].tokens, terms[t].edges[i], terms[t].edges[i + 1],
                           terms[t].weights, terms[t].rows, terms[t].stride, n);
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
