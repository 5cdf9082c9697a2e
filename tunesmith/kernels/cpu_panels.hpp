// Products of many tokens with bfloat16 rows as they lie (of codes: cpu_widen.hpp). Tokens go by groups of 16, one to a lane, and every number of
// a group lies beside those of its other tokens:
//
//     x      [pairs of columns, 16 tokens, 2]  bfloat16
//     sums   [rows, 16 tokens]                 float32
//
// A register of x (16 tokens, two columns) meets two columns of a row in all lanes: 8 rows of 3 groups are 24 sums in
// registers, each line of x read once for 8 products. So no weight is laid out anew, nothing is added up across lanes,
// and what follows (norms, turns, softmax) goes by whole vectors. The matrix unit reads the same layouts.
#pragma once
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_model.hpp"

// Memory that grows, in lines of the cache and on large pages: what a fresh one costs is paid once.
template <class Value>
class Room {
   public:
    Value *of(int64_t count) {
        if (count <= size) return data.get();
        constexpr size_t PAGE = size_t(1) << 21;
        size_t bytes = sizeof(Value) * size_t(count), unit = bytes < PAGE ? 64 : PAGE;
        bytes = (bytes + unit - 1) / unit * unit;
        size = 0;
        data.reset();
        data.reset(static_cast<Value *>(std::aligned_alloc(unit, bytes)));
        if (!data) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (unit == PAGE) madvise(data.get(), bytes, MADV_HUGEPAGE);
#endif
        std::memset(static_cast<void *>(data.get()), 0, bytes);
        size = count;
        return data.get();
    }

   private:
    struct Free {
        void operator()(Value *memory) const { std::free(memory); }
    };
    std::unique_ptr<Value, Free> data;
    int64_t size = 0;
};

#if WIDE

constexpr int64_t GROUP = 16;       // tokens
constexpr int MOST_GROUPS = 3;      // at a time
constexpr int64_t PART_ROWS = 64;   // of a weight, at most, for one part of a phase

// Of `pairs` pairs of columns. ld: columns of a row; stride: of a group of x; of_group: of a group of sums.
template <int R, int V>
inline void sums_of_rows(const uint16_t *w, int64_t ld, const uint16_t *x, int64_t stride, int64_t pairs, float *sums,
                         int64_t of_group, bool is_first) {
    __m512 sum[R * V];
    each<R * V>([&](auto i) {
        sum[i] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i % V * of_group + i / V * GROUP);
    });
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh own[V];
        each<V>([&](auto v) { own[v] = (__m512bh)_mm512_loadu_si512(x + v * stride + p * 2 * GROUP); });
        each<R>([&](auto r) {
            int32_t pair;
            std::memcpy(&pair, w + r * ld + 2 * p, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            each<V>([&](auto v) { sum[r * V + v] = _mm512_dpbf16_ps(sum[r * V + v], both, own[v]); });
        });
    }
    each<R * V>([&](auto i) { _mm512_storeu_ps(sums + i % V * of_group + i / V * GROUP, sum[i]); });
}

template <int V>
inline void sums_of_some(int64_t rows, const uint16_t *w, int64_t ld, const uint16_t *x, int64_t stride, int64_t pairs,
                         float *sums, int64_t of_group, bool is_first) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8)
        sums_of_rows<8, V>(w + row * ld, ld, x, stride, pairs, sums + row * GROUP, of_group, is_first);
    for (; row < rows; row++)
        sums_of_rows<1, V>(w + row * ld, ld, x, stride, pairs, sums + row * GROUP, of_group, is_first);
}

#if TILES
// 16 R rows of V groups. In registers: 0 to 3 the sums, 4 and 5 rows, 6 and 7 groups.
template <int R, int V>
inline void sums_by_tiles(const uint16_t *w, int64_t ld, const uint16_t *x, int64_t stride, int64_t width, float *sums,
                          int64_t of_group, bool is_first) {
    float *below = sums + 16 * GROUP, *beside = sums + of_group, *last = beside + 16 * GROUP;
    if (is_first) {
        _tile_zero(0);
        if (V > 1) _tile_zero(1);
        if (R > 1) _tile_zero(2);
        if (R > 1 && V > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        if (V > 1) _tile_loadd(1, beside, 64);
        if (R > 1) _tile_loadd(2, below, 64);
        if (R > 1 && V > 1) _tile_loadd(3, last, 64);
    }
    for (int64_t k = 0; k < width; k += 32) {
        _tile_loadd(4, w + k, 2 * ld);
        _tile_loadd(6, x + k * GROUP, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (V > 1) {
            _tile_loadd(7, x + stride + k * GROUP, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (R > 1) {
            _tile_loadd(5, w + 16 * ld + k, 2 * ld);
            _tile_dpbf16ps(2, 5, 6);
            if (V > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    if (V > 1) _tile_stored(1, beside, 64);
    if (R > 1) _tile_stored(2, below, 64);
    if (R > 1 && V > 1) _tile_stored(3, last, 64);
}

template <int V>
inline void sums_by_unit(int64_t rows, const uint16_t *w, int64_t ld, const uint16_t *x, int64_t stride, int64_t width,
                         float *sums, int64_t of_group, bool is_first) {
    int64_t row = 0;
    for (; row + 32 <= rows; row += 32)
        sums_by_tiles<2, V>(w + row * ld, ld, x, stride, width, sums + row * GROUP, of_group, is_first);
    for (; row + 16 <= rows; row += 16)
        sums_by_tiles<1, V>(w + row * ld, ld, x, stride, width, sums + row * GROUP, of_group, is_first);
    if (row < rows)
        sums_of_some<V>(
            rows - row, w + row * ld, ld, x, stride, width / 2, sums + row * GROUP, of_group, is_first);
}

// The unit's registers have this shape from here to the end.
class Unit {
   public:
    explicit Unit(bool is_used) : is_used(is_used) {
        if (!is_used) return;
        TileShape shape;
        for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
        asm volatile("" ::: "memory");
        _tile_loadconfig(&shape);
    }
    ~Unit() {
        if (is_used) _tile_release();
    }

   private:
    bool is_used;
};
#else
struct Unit {
    explicit Unit(bool) {}
};
#endif

inline bool fits_unit(int64_t width) { return has_tiles() && width % 32 == 0; }

inline int64_t groups_at_a_time(int64_t width) { return fits_unit(width) ? 2 : MOST_GROUPS; }

// The sums of some rows and of up to as many groups as go at a time, by columns that stay in a core's cache.
inline void sums_of_groups(int64_t rows, const uint16_t *w, int64_t ld, int64_t width, const uint16_t *x,
                           int64_t stride, int64_t groups, float *sums, int64_t of_group) {
    bool by_unit = fits_unit(width);
    int64_t most = by_unit ? 512 : 5120, blocks = (width + most - 1) / most;
    int64_t deep = (width + 32 * blocks - 1) / (32 * blocks) * 32;
    Unit unit(by_unit);
    for (int64_t k = 0; k < width; k += deep, w += deep, x += deep * GROUP) {
        int64_t count = std::min(deep, width - k);
#if TILES
        if (by_unit) {
            if (groups == 1) sums_by_unit<1>(rows, w, ld, x, stride, count, sums, of_group, k == 0);
            else sums_by_unit<2>(rows, w, ld, x, stride, count, sums, of_group, k == 0);
            continue;
        }
#endif
        if (groups == 1) sums_of_some<1>(rows, w, ld, x, stride, count / 2, sums, of_group, k == 0);
        else if (groups == 2) sums_of_some<2>(rows, w, ld, x, stride, count / 2, sums, of_group, k == 0);
        else sums_of_some<3>(rows, w, ld, x, stride, count / 2, sums, of_group, k == 0);
    }
}

// Rows of a weight in bfloat16.
struct Rows {
    const uint16_t *data;
    int64_t ld, width;
};

// put(group, sums [count, 16 tokens]) of so many rows, count <= PART_ROWS, and groups from .. to.
template <class Put>
inline void product_by_groups(
    const Rows &rows, const uint16_t *x, int64_t count, int64_t from, int64_t to, const Put &put) {
    alignas(64) float sums[MOST_GROUPS * PART_ROWS * GROUP];
    int64_t stride = rows.width * GROUP, most = groups_at_a_time(rows.width);
    for (int64_t g = from; g < to; g += most) {
        int64_t groups = std::min(most, to - g);
        sums_of_groups(
            count, rows.data, rows.ld, rows.width, x + g * stride, stride, groups, sums, PART_ROWS * GROUP);
        for (int64_t i = 0; i < groups; i++) put(g + i, sums + i * PART_ROWS * GROUP);
    }
}

// Two rows of 16 tokens as x is.
inline void pair_up(__m512 first, __m512 second, uint16_t *to) {
    const __m512i together = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(together, both));
}

// Rows of 16 tokens (apart by 16) as one row of `width` bfloat16 a token; place(token): where to, or none.
template <class Place>
inline void put_tokens(const float *rows, int64_t width, const Place &place) {
    for (int64_t i = 0; i < width; i += 16) {
        __m512 v[16];
        int64_t count = std::min<int64_t>(16, width - i);
        for (int r = 0; r < 16; r++) v[r] = r < count ? _mm512_loadu_ps(rows + (i + r) * GROUP) : _mm512_setzero_ps();
        transpose(v);
        for (int t = 0; t < 16; t++) {
            uint16_t *to = place(t);
            if (to) _mm256_mask_storeu_epi16(to + i, (1u << count) - 1, (__m256i)_mm512_cvtneps_pbh(v[t]));
        }
    }
}
#endif
