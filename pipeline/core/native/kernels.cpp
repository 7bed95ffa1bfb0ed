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

#ifdef __AVX2__
#include <immintrin.h>
#endif

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

inline bool larger(float a, float b) { return b == b && !(a <= b); }  // a NaN is larger than all else

// Where the n largest of some values end: all that are larger than `value`, and the first `ties` that equal it.
struct Cut {
    float value;
    i64 ties;
    bool takes(float x, i64 &left) const {
        if (larger(x, value)) return true;
        const bool tie = x == value || (x != x && value != value);
        return tie && left-- > 0;
    }
};

Cut cut_of(const Candidate *found, i64 count, i64 n, float *space) {
    if (count <= n) return {-INFINITY, 0};
    for (i64 j = 0; j < count; ++j) space[j] = found[j].value;
    std::nth_element(space, space + n - 1, space + count, larger);
    const float value = space[n - 1];
    i64 more = 0;
    for (i64 j = 0; j < count; ++j) more += larger(found[j].value, value);
    return {value, n - more};
}

// Which of 8 values reach the bound (exceed it, where STRICT), as bits; a NaN does.
template <bool STRICT>
inline uint64_t reach(const float *x, float bound) {
#ifdef __AVX2__
    return _mm256_movemask_ps(
        _mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_set1_ps(bound), STRICT ? _CMP_NLE_UQ : _CMP_NLT_UQ));
#else
    uint64_t bits = 0;
    for (int j = 0; j < 8; ++j) bits |= uint64_t(STRICT ? !(x[j] <= bound) : !(x[j] < bound)) << j;
    return bits;
#endif
}

// The same of 8 values that exceed a bound each.
inline uint64_t exceeds(const float *x, const float *bound) {
#ifdef __AVX2__
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(bound), _CMP_NLE_UQ));
#else
    uint64_t bits = 0;
    for (int j = 0; j < 8; ++j) bits |= uint64_t(!(x[j] <= bound[j])) << j;
    return bits;
#endif
}

template <bool STRICT>
i64 above(const float *h, i64 n, float bound, Candidate *found) {
    i64 count = 0, d = 0;
    for (; d + 64 <= n; d += 64) {
        uint64_t bits = 0;
        for (int j = 0; j < 64; j += 8) bits |= reach<STRICT>(h + d + j, bound) << j;
        for (; bits; bits &= bits - 1) {
            const i64 index = d + __builtin_ctzll(bits);
            found[count++] = {h[index], index};
        }
    }
    for (; d < n; ++d)
        if (STRICT ? !(h[d] <= bound) : !(h[d] < bound)) found[count++] = {h[d], d};
    return count;
}

// Those that reach the bound (exceed it, where `strict`) and 0, in order. -> how many
i64 above(const float *h, i64 n, float bound, bool strict, Candidate *found) {
    return bound > 0 && !strict ? above<false>(h, n, bound, found) : above<true>(h, n, bound, found);
}

// A bound at least 0 that at least k values reach, and not many more: of the maxima of `groups` interleaved groups k
// reach it. Found by halving, which mispredicts no branch.
float bound_of(const float *h, i64 n, i64 k, i64 groups, float *best) {
    float low = 0, high = 0;
    for (i64 g = 0; g < groups; g += 32) {
        float most[32];  // in registers
        for (int j = 0; j < 32; ++j) most[j] = h[g + j];
        for (i64 d = g + groups; d + 32 <= n; d += groups)
            for (int j = 0; j < 32; ++j) most[j] = h[d + j] > most[j] ? h[d + j] : most[j];
        for (int j = 0; j < 32; ++j) best[g + j] = most[j];
        for (int j = 0; j < 32; ++j) high = most[j] > high ? most[j] : high;
    }
    if (!(high < INFINITY)) return 0;
    for (int halving = 0; halving < 24; ++halving) {
        const float middle = 0.5f * (low + high);
        int count = 0;
        for (i64 j = 0; j < groups; ++j) count += best[j] >= middle;
        (count >= k ? low : high) = middle;
        if (count >= k && count <= k + 1) break;
    }
    return low;
}

// A thread's part of the pairs of a gate.
struct GatePart {
    std::vector<i64> active, beyond;
    std::vector<float> values;
    i64 n_active = 0, n_beyond = 0;

    // Both lists are written and one of them goes on, since a branch would be mispredicted too often.
    inline void add(float x, float theta, float half, i64 index) {
        const float above = x - theta;
        const bool is_active = !(above <= 0), is_beyond = !is_active && above > -half;
        active[n_active] = beyond[n_beyond] = index;
        values[n_active] = x;
        n_active += is_active;
        n_beyond += is_beyond;
    }

    void row(const float *x, i64 n, const float *theta, const float *low, float half) {
        if (n_active + n > (i64)active.size()) active.resize(2 * n_active + n), values.resize(active.size());
        if (n_beyond + n > (i64)beyond.size()) beyond.resize(2 * n_beyond + n);
        i64 d = 0;
        for (; d + 64 <= n; d += 64) {
            uint64_t bits = 0;
            for (int j = 0; j < 64; j += 8) bits |= exceeds(x + d + j, low + d + j) << j;
            for (; bits; bits &= bits - 1) {
                const i64 index = d + __builtin_ctzll(bits);
                add(x[index], theta[index], half, index);
            }
        }
        for (; d < n; ++d)
            if (!(x[d] <= low[d])) add(x[d], theta[d], half, d);
    }
};

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

// For each feature the product of its row with the sum of its tokens' rows, added to `out`.
void clt_sum_products(const i64 *order, const i64 *tokens, const i64 *edges, i64 n_features, const float *x,
                      i64 x_stride, const float *table, i64 n, float *out, i64 n_threads) {
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        std::vector<float> sum(n);
        float *y = sum.data();
#pragma omp for schedule(dynamic, 64)
        for (i64 i = 0; i < n_features; ++i) {
            i64 e = edges[i];
            if (e == edges[i + 1]) continue;
            std::memcpy(y, x + tokens[e++] * x_stride, n * sizeof(float));
            for (; e + 4 <= edges[i + 1]; e += 4)
                add_rows(y, x + tokens[e] * x_stride, x + tokens[e + 1] * x_stride, x + tokens[e + 2] * x_stride,
                         x + tokens[e + 3] * x_stride, 1, 1, 1, 1, n);
            for (; e < edges[i + 1]; ++e) add_row(y, x + tokens[e] * x_stride, 1, n);
            out[i] += dot(y, table + i * n, n);
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
    std::vector<GatePart> parts(n_threads);
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
