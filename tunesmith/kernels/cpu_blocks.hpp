// Small and skinny float32 products.
#pragma once
#include <vector>

#include "cpu_threads.hpp"

constexpr int64_t WIDE = 4 * LANES;

// Read once: a compiler may take a vector from memory for every sum instead.
inline Vector in_register(Vector v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#endif
    return v;
}

// c [HIGH, 16 VECTORS] (+)= a b; a's element (i, k) lies at i * row + k * column.
template <int HIGH, int VECTORS>
inline void add_block(const float *a, int64_t row, int64_t column, const float *b, int64_t b_ld, float *c, int64_t c_ld,
                      int64_t depth, bool adds) {
    Vector sums[HIGH][VECTORS];
    for (int i = 0; i < HIGH; i++) {
        for (int v = 0; v < VECTORS; v++) sums[i][v] = adds ? *(const Vector *)(c + i * c_ld + v * LANES) : Vector{};
    }
    for (int64_t k = 0; k < depth; k++) {
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = in_register(*(const Vector *)(b + k * b_ld + v * LANES));
        for (int i = 0; i < HIGH; i++) {
            float left = a[i * row + k * column];
            for (int v = 0; v < VECTORS; v++) sums[i][v] += left * right[v];
        }
    }
    for (int i = 0; i < HIGH; i++) {
        for (int v = 0; v < VECTORS; v++) *(Vector *)(c + i * c_ld + v * LANES) = sums[i][v];
    }
}

template <int VECTORS>
inline void add_columns(const float *a, int64_t row, int64_t column, const float *b, int64_t b_ld, float *c,
                        int64_t c_ld, int64_t rows, int64_t depth, bool adds) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        add_block<4, VECTORS>(a + i * row, row, column, b, b_ld, c + i * c_ld, c_ld, depth, adds);
    }
    for (; i < rows; i++) add_block<1, VECTORS>(a + i * row, row, column, b, b_ld, c + i * c_ld, c_ld, depth, adds);
}

// c [rows, width] (+)= a b, width a multiple of 16. What is read of b by all rows stays in the nearest cache.
inline void add_product(const float *a, int64_t row, int64_t column, const float *b, int64_t b_ld, float *c,
                        int64_t c_ld, int64_t rows, int64_t width, int64_t depth, bool adds) {
    for (int64_t k = 0; k < depth; k += WIDE, adds = true) {
        const float *left = a + k * column, *right = b + k * b_ld;
        int64_t n = 0, deep = least(WIDE, depth - k);
        for (; n + WIDE <= width; n += WIDE) {
            add_columns<4>(left, row, column, right + n, b_ld, c + n, c_ld, rows, deep, adds);
        }
        for (; n < width; n += LANES) {
            add_columns<1>(left, row, column, right + n, b_ld, c + n, c_ld, rows, deep, adds);
        }
    }
}

// out [rank, width] = scale * left.T right, or its transpose where it is `turned`: left [tokens, rank] and right
// [tokens, width] are narrow, so that parts of the tokens are summed apart, and the parts in their order.
struct Outer {
    const float *left, *right;
    float *out;
    int64_t left_ld, right_ld, rank, width, turned;
    float scale;
};

constexpr int64_t OUTER_TOKENS = 256;  // of a part

inline void finish_outer(const Outer &job, const float *sums, int64_t parts, int64_t part_size) {
    for (int64_t i = 0; i < job.rank; i++) {
        for (int64_t j = 0; j < job.width; j += LANES) {
            Vector total = {};
            for (int64_t p = 0; p < parts; p++) total += *(const Vector *)(sums + p * part_size + i * job.width + j);
            total *= job.scale;
            if (!job.turned) *(Vector *)(job.out + i * job.width + j) = total;
            else for (int64_t l = 0; l < LANES; l++) job.out[(j + l) * job.rank + i] = total[l];
        }
    }
}

inline void multiply_outer(const Outer *jobs, int64_t count, int64_t tokens, int64_t threads) {
    static std::vector<float> memory;  // one call at a time: see cpu_train.cpp
    std::vector<int64_t> starts(count + 1);
    for (int64_t i = 0; i < count; i++) starts[i + 1] = starts[i] + jobs[i].rank * jobs[i].width;
    int64_t parts = parts_of(tokens, OUTER_TOKENS), size = starts[count];
    if (int64_t(memory.size()) < parts * size) memory.resize(parts * size);
    for_each(parts * count, threads, [&](int64_t part) {
        const Outer &job = jobs[part % count];
        int64_t t = part / count * OUTER_TOKENS;
        add_product(job.left + t * job.left_ld, 1, job.left_ld, job.right + t * job.right_ld, job.right_ld,
                    memory.data() + part / count * size + starts[part % count], job.width, job.rank, job.width,
                    least(OUTER_TOKENS, tokens - t), false);
    });
    for_each(count, threads, [&](int64_t i) { finish_outer(jobs[i], memory.data() + starts[i], parts, size); });
}
