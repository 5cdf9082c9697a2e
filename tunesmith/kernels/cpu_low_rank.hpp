// Low-rank adapters beside a weight: y += up (down x), each range of rows that has one by columns of its own of down x.
#pragma once
#include "cpu_math.hpp"
#include "cpu_products.hpp"

struct LowRankPart {  // rows row .. row + rows of y; columns column .. column + rank of down x
    int64_t row, rows, column, rank, is_half;
    const void *up;  // [rank, rows]
};

struct LowRank {
    Weight down;  // of all parts, below each other: float32, or of the weight's own kind
    int64_t num_parts;
    const LowRankPart *parts;
};

struct Linear {
    Weight weight;
    const LowRank *low;  // or none
};

inline Vector vector_of(const float *from) { return *(const Vector *)from; }
inline Vector vector_of(const uint16_t *from) {
    return (Vector)(__builtin_convertvector(*(const Halves *)from, Words) << 16);
}

// y[i] += the sum of low[r] * up[r * stride + i].
template <class Value>
inline void add_columns(const Value *up, int64_t stride, int64_t rank, const float *low, int64_t count, float *y) {
    int64_t i = 0;
    auto by = [&](auto vectors) {
        constexpr int N = decltype(vectors)::value;
        for (; i + N * LANES <= count; i += N * LANES) {
            Vector sum[N] = {};
            for (int64_t r = 0; r < rank; r++)
                for (int n = 0; n < N; n++) sum[n] += low[r] * vector_of(up + r * stride + i + n * LANES);
            for (int n = 0; n < N; n++) *(Vector *)(y + i + n * LANES) += sum[n];
        }
    };
    by(std::integral_constant<int, 4>());
    by(std::integral_constant<int, 1>());
    for (; i < count; i++) {
        float sum = 0;
        for (int64_t r = 0; r < rank; r++) sum += low[r] * widen(up[r * stride + i]);
        y[i] += sum;
    }
}

// Rows first .. last of what the adapters add to `y`, float32. low: down x, [tokens, all ranks].
inline void add_low_rank(
    const LowRank &all, const float *low, int64_t tokens, int64_t first, int64_t last, float *y, int64_t ld) {
    for (int64_t p = 0; p < all.num_parts; p++) {
        const LowRankPart &part = all.parts[p];
        int64_t begin = std::max(first, part.row), count = std::min(last, part.row + part.rows) - begin;
        for (int64_t t = 0; t < tokens && count > 0; t++) {
            const float *own = low + t * all.down.rows + part.column;
            auto add = [&](auto *up) {
                add_columns(up + begin - part.row, part.rows, part.rank, own, count, y + t * ld + begin);
            };
            if (part.is_half) add(static_cast<const uint16_t *>(part.up));
            else add(static_cast<const float *>(part.up));
        }
    }
}
