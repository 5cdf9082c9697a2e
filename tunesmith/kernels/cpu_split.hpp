// Products of float32 matrices through the matrix unit, which multiplies bfloat16: every number is the exact sum of
// three bfloat16 (8 + 8 + 8 bits), and of the nine products the six that float32 can see are summed in float32.
//
//     a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1) + at most 2^-23 |a b|
//
// Left factors are split by 32 rows as they are needed, right ones before the product, in tiles of 16 pairs x 16.
#pragma once
#include <cstdlib>

#include "cpu_threads.hpp"
#include "cpu_unit.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AMX_BF16__) && \
    defined(__linux__)
#define SPLITS 1
#include <immintrin.h>
#else
#define SPLITS 0
#endif

// The right factor: weight [rows, columns], plus wide @ narrow for bands of its rows. out = x @ weight.T, or, where
// it lies `flat`, x @ weight; and where it is wanted low = x @ narrow.T, or x @ wide, by columns behind the weight's.
struct Band {
    int64_t row, row_end, inner, inner_end;
};
struct Right {
    const float *weight, *wide, *narrow;  // wide [rows, rank], narrow [rank, columns]
    int64_t rows, columns, wide_ld, narrow_ld, flat, num_bands;
    const Band *bands;
    int64_t rank;  // of low, or 0
};
struct Product {
    const float *x, *residual, *bias;  // residual [tokens, width] and bias [width], or none
    float *out;
    int64_t tokens, x_ld, residual_ld, out_ld;
    Right right;
    float *low;
    int64_t low_ld;
};

#if SPLITS

constexpr int64_t PIECES = 3, TILE = 16, DEEP = 32, PANEL = 32;  // a panel: 32 rows, or 32 columns
constexpr int64_t MOST_DEEP = 512, PART = 128;  // k of a pass and rows of a part: what these take stays in L2
constexpr int64_t GROUP = 4 * PANEL;            // columns whose lines are written one after the other

inline bool can_split() { return may_use_unit(); }

// Memory that a process keeps for the pieces of right factors, or a thread for those of its rows.
class Scratch {
   public:
    ~Scratch() { std::free(data); }
    uint16_t *of(int64_t count) {
        if (count > size) {
            std::free(data);
            data = static_cast<uint16_t *>(std::aligned_alloc(64, size_t(2 * count + 63) / 64 * 64));
            size = data ? count : 0;
            if (!data) throw std::bad_alloc();
        }
        return data;
    }

   private:
    uint16_t *data = nullptr;
    int64_t size = 0;
};

// 16 numbers of each of two vectors: what is left of them after this piece.
inline __m512i next_piece(__m512 &low, __m512 &high) {
    __m512i piece = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    auto widened = [](__m256i half) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(piece)));
    high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(piece, 1)));
    return piece;
}

// One row of the right factor's weight with its adapters.
inline void weight_row(const Right &r, int64_t row, float *out) {
    const float *from = r.weight + row * r.columns;
    const Band *band = nullptr;
    for (int64_t i = 0; i < r.num_bands; i++) {
        if (row >= r.bands[i].row && row < r.bands[i].row_end) band = &r.bands[i];
    }
    for (int64_t i = 0; i < r.columns; i += LANES) {
        Vector sum = load(from + i, r.columns - i);
        if (band) {
            for (int64_t k = band->inner; k < band->inner_end; k++) {
                sum += r.wide[row * r.wide_ld + k] * load(r.narrow + k * r.narrow_ld + i, r.columns - i);
            }
        }
        store(out + i, sum, r.columns - i);
    }
}

// Right factor: [panel of 32 columns][step of 32 k][piece][tile of 16 columns][pair of k][column][2].
// Left factor:  [panel of 32 rows][step of 32 k][piece][row][32 k].
constexpr int64_t STEP = PIECES * PANEL * DEEP;  // numbers of a panel's step

inline int64_t padded(int64_t columns) { return parts_of(columns, PANEL) * PANEL; }

inline uint16_t *tile_of(uint16_t *to, int64_t k, int64_t n, int64_t steps) {
    return to + (n / PANEL * steps + k / DEEP) * STEP + n % PANEL / TILE * TILE * DEEP;
}

// Two rows of a flat weight: k is the row.
inline void pack_pair(const Right &r, int64_t k, int64_t steps, float *rows, uint16_t *to) {
    int64_t behind = padded(r.columns), total = behind + padded(r.rank);
    std::memset(rows, 0, 8 * total);
    for (int64_t i = 0; i < 2 && k + i < r.rows; i++) {
        weight_row(r, k + i, rows + i * total);
        if (r.rank) std::memcpy(rows + i * total + behind, r.wide + (k + i) * r.wide_ld, 4 * r.rank);
    }
    const __m512i together = _mm512_set_epi16(  // a number of the first row, one of the second
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    for (int64_t n = 0; n < total; n += TILE) {
        __m512 first = _mm512_loadu_ps(rows + n), second = _mm512_loadu_ps(rows + total + n);
        uint16_t *at = tile_of(to, k, n, steps) + k % DEEP / 2 * DEEP;
        for (int64_t p = 0; p < PIECES; p++, at += PANEL * DEEP) {
            _mm512_storeu_si512(at, _mm512_permutexvar_epi16(together, next_piece(first, second)));
        }
    }
}

// 16 rows of a weight that is multiplied transposed: n is the row.
inline void pack_rows(const Right &r, int64_t n, int64_t steps, float *rows, uint16_t *to) {
    int64_t deep = steps * DEEP, behind = padded(r.rows);
    std::memset(rows, 0, 4 * TILE * deep);
    for (int64_t i = 0; i < TILE; i++) {
        int64_t inner = n + i - behind;
        float *own = rows + i * deep;
        if (n + i < r.rows) weight_row(r, n + i, own);
        else if (inner >= 0 && inner < r.rank) std::memcpy(own, r.narrow + inner * r.narrow_ld, 4 * r.columns);
    }
    for (int64_t k = 0; k < deep; k += DEEP) {
        uint16_t *tile = tile_of(to, k, n, steps);
        for (int64_t i = 0; i < TILE; i++) {
            const float *from = rows + i * deep + k;
            __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + TILE);
            for (int64_t p = 0; p < PIECES; p++) {
                alignas(64) uint32_t pairs[TILE];
                _mm512_store_si512(pairs, next_piece(low, high));
                uint16_t *at = tile + p * PANEL * DEEP + 2 * i;
                for (int64_t j = 0; j < TILE; j++) std::memcpy(at + j * DEEP, pairs + j, 4);
            }
        }
    }
}

inline __m512 some(const float *from, int64_t left) {
    __mmask16 mask = left >= TILE ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
    return _mm512_maskz_loadu_ps(mask, from);
}

// Up to PART rows of the left factor. A step of all rows of a panel comes before the next: what is written lies close.
inline void split_rows(const Product &job, int64_t row, int64_t count, int64_t k, int64_t deep, uint16_t *to) {
    for (int64_t first = 0; first < count; first += PANEL) {
        for (int64_t i = 0; i < deep; i += DEEP, to += STEP) {
            for (int64_t t = 0; t < PANEL; t++) {
                int64_t left = first + t < count ? deep - i : 0;
                const float *from = job.x + (row + first + t) * job.x_ld + k + i;
                __m512 low = some(from, left), high = some(from + TILE, left - TILE);
                for (int64_t p = 0; p < PIECES; p++) {
                    _mm512_store_si512(to + (p * PANEL + t) * DEEP, next_piece(low, high));
                }
            }
        }
    }
}

// In registers: 0 to 3 the sums, 4 and 5 rows, 6 and 7 columns.
inline void load_rows(const uint16_t *piece) {
    _tile_loadd(4, piece, 64);
    _tile_loadd(5, piece + TILE * DEEP, 64);
}

inline void load_columns(const uint16_t *piece) {
    _tile_loadd(6, piece, 64);
    _tile_loadd(7, piece + TILE * DEEP, 64);
}

inline void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// 32 x 32 sums over these steps: a and b as above, the small products of a step before its large one. The lines of the
// output are asked for meanwhile: they are far from each other, and storing would wait for each.
inline void multiply_panel(const uint16_t *a, const uint16_t *b, int64_t steps, const float *out, int64_t ld) {
    constexpr int64_t piece = PANEL * DEEP;
    int64_t lines = parts_of(PANEL, steps), line = 0;
    for (int64_t s = 0; s < steps; s++, a += STEP, b += STEP) {
        for (int64_t stop = least(PANEL, line + lines); line < stop; line++) {
            __builtin_prefetch(out + line * ld, 1);
            __builtin_prefetch(out + line * ld + TILE, 1);
        }
        load_rows(a + 2 * piece), load_columns(b), add_products();
        load_rows(a + piece), add_products();
        load_columns(b + piece), add_products();
        load_rows(a), add_products();
        load_columns(b + 2 * piece), add_products();
        load_columns(b), add_products();
    }
}

struct alignas(64) TileShape {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void start_sums(const float *from, int64_t ld) {
    if (!from) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    _tile_loadd(0, from, 4 * ld);
    _tile_loadd(1, from + TILE, 4 * ld);
    _tile_loadd(2, from + TILE * ld, 4 * ld);
    _tile_loadd(3, from + TILE * ld + TILE, 4 * ld);
}

inline void store_sums(float *to, int64_t ld) {
    _tile_stored(0, to, 4 * ld);
    _tile_stored(1, to + TILE, 4 * ld);
    _tile_stored(2, to + TILE * ld, 4 * ld);
    _tile_stored(3, to + TILE * ld + TILE, 4 * ld);
}

// 32 x 32 of the output; at its edges by way of a buffer.
inline void output_panel(const Product &job, const uint16_t *a, const uint16_t *b, int64_t steps, int64_t row,
                         int64_t column, int64_t width, bool is_first) {
    alignas(64) float edge[PANEL * PANEL];
    int64_t rows = least(PANEL, job.tokens - row), columns = least(PANEL, width - column);
    const float *before = is_first ? job.residual : job.out;
    int64_t before_ld = is_first ? job.residual_ld : job.out_ld;
    if (before) before += row * before_ld + column;
    float *out = job.out + row * job.out_ld + column;
    bool is_whole = rows == PANEL && columns == PANEL;
    if (!is_whole && before) {
        std::memset(edge, 0, sizeof edge);
        for (int64_t i = 0; i < rows; i++) std::memcpy(edge + i * PANEL, before + i * before_ld, 4 * columns);
    }
    start_sums(before && !is_whole ? edge : before, is_whole ? before_ld : PANEL);
    multiply_panel(a, b, steps, is_whole ? out : edge, is_whole ? job.out_ld : PANEL);
    if (is_whole) return store_sums(out, job.out_ld);
    store_sums(edge, PANEL);
    for (int64_t i = 0; i < rows; i++) std::memcpy(out + i * job.out_ld, edge + i * PANEL, 4 * columns);
}

// Some rows of the output, all of its columns.
inline void output_rows(const Product &job, int64_t row, const uint16_t *right, int64_t depth, int64_t width) {
    thread_local Scratch pieces;
    int64_t count = least(PART, job.tokens - row), all_steps = parts_of(depth, DEEP);
    int64_t behind = padded(width), total = behind + padded(job.right.rank);
    Product low = job;
    low.residual = nullptr;
    low.out = job.low;
    low.out_ld = job.low_ld;
    TileShape shape;
    _tile_loadconfig(&shape);
    for (int64_t k = 0; k < depth; k += MOST_DEEP) {
        int64_t deep = least(MOST_DEEP, depth - k), steps = parts_of(deep, DEEP);
        uint16_t *a = pieces.of(PART * MOST_DEEP * PIECES);
        split_rows(job, row, count, k, deep, a);
        for (int64_t group = 0; group < total; group += GROUP) {
            for (int64_t t = 0; t < count; t += PANEL) {
                for (int64_t column = group; column < least(total, group + GROUP); column += PANEL) {
                    const uint16_t *b = right + (column / PANEL * all_steps + k / DEEP) * STEP;
                    const uint16_t *panel = a + t / PANEL * steps * STEP;
                    if (column < behind) output_panel(job, panel, b, steps, row + t, column, width, k == 0);
                    else output_panel(low, panel, b, steps, row + t, column - behind, job.right.rank, k == 0);
                }
            }
        }
    }
    _tile_release();
    if (!job.bias) return;
    for (int64_t t = row; t < row + count; t++) {
        float *out = job.out + t * job.out_ld;
        for (int64_t i = 0; i < width; i += LANES) {
            store(out + i, load(out + i, width - i) + load(job.bias + i, width - i), width - i);
        }
    }
}

inline void multiply(const Product &job, int64_t threads) {
    static Scratch kept;  // one product at a time: see cpu_train.cpp
    const Right &r = job.right;
    int64_t depth = r.flat ? r.rows : r.columns, width = r.flat ? r.columns : r.rows;
    int64_t steps = parts_of(depth, DEEP), total = padded(width) + padded(r.rank);
    uint16_t *right = kept.of(steps * DEEP * total * PIECES);
    int64_t unit = r.flat ? 2 : TILE, deep = steps * DEEP;  // rows of the weight
    for_each((r.flat ? deep : total) / unit, threads, [&](int64_t part) {
        thread_local Scratch rows;
        float *numbers = reinterpret_cast<float *>(rows.of(2 * (r.flat ? 2 * total : TILE * deep)));
        if (r.flat) pack_pair(r, 2 * part, steps, numbers, right);
        else pack_rows(r, TILE * part, steps, numbers, right);
    });
    for_each(parts_of(job.tokens, PART), threads, [&](int64_t part) {
        output_rows(job, part * PART, right, depth, width);
    });
}

#else

inline bool can_split() { return false; }
inline void multiply(const Product &, int64_t) {}

#endif
