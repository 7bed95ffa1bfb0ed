// Which pairs of token and feature are active, for kernels.cpp.
//
// Comparisons are written so that a NaN counts as large: it is chosen, and the loss shows it.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef int64_t i64;

namespace {

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

// A thread's part of the pairs of a gate; what lies behind the two numbers is left from before.
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
