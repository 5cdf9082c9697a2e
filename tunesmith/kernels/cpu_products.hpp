// Products of 1 to 16 tokens with a weight as it lies, each row of it read once for all tokens. Sums in float32.
//
//     float32   fma                                       x float32
//     bfloat16  pairs of products                         x rounded to bfloat16
//     int8      codes widened to 16 bits, sums in int32   x = q * step, q of 16 bits, a step for each 128 columns
//     int4      (code - zero) of 16 bits, likewise        likewise
//
// With AVX-512 that has bfloat16 and VNNI through intrinsics; elsewhere plain loops, which the compiler vectorises.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define WIDE 1
#include <immintrin.h>
#else
#define WIDE 0
#endif

#if WIDE && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define TILES 0
#endif

constexpr int MOST = 16;    // tokens
constexpr int BLOCK = 128;  // columns that share a step, and a block of int4 words

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };
enum Store { SET, ADD, SET_BFLOAT16 };

struct Weight {  // y = x @ w.T + bias, w [rows, width]
    int64_t kind, rows, width, group;
    const void *data;
    const float *scale;    // int8: a row's; int4: [rows, padded width / group]
    const uint8_t *zeros;  // int4: like scale, or none: 8 everywhere
    const float *bias;
};

struct Input {  // what a product reads, [MOST, ld] in the form of its kind
    const float *wide;
    int64_t wide_ld, ld;
    uint16_t *half;
    int16_t *codes;
    float *steps;     // [ld / BLOCK, MOST]
    uint16_t *tiles;  // bfloat16 as tiles are: [ld / 32, 16 pairs of columns, MOST, 2]
};

struct Output {
    void *data;
    int64_t ld;
    Store store;
};

inline int64_t padded(int64_t width) { return (width + BLOCK - 1) / BLOCK * BLOCK; }

inline float widen(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float widen(float x) { return x; }

inline uint16_t narrow(float x) {  // to the nearest, ties to even; what is no number stays none
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// The column of a block that lies at place p of a row of 16-bit codes, so that words of int4 meet it unshuffled:
// nibbles m and 4 + m of word i are columns 16 m + i and 64 + 16 m + i.
inline int column_of(Kind kind, int place) {
    if (!WIDE || kind != INT4) return place;
    int vector = place / 32, lane = place % 32 / 2;
    return 16 * vector + lane + (place % 2 ? 64 : 0);
}

constexpr int TILE_TOKENS = 5;  // from here on the matrix unit is faster

// Whether products of so many tokens go through the matrix unit, which Linux lets a process use that asks for it.
inline bool uses_tiles(const Weight &w, int64_t tokens) {
#if TILES
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return allowed && w.kind == BFLOAT16 && tokens >= TILE_TOKENS && w.width % 32 == 0;
#else
    return (void)w, (void)tokens, false;
#endif
}

// One row of x (width values) in the form that products of this kind read.
inline void prepare(Kind kind, const float *x, int64_t width, const Input &in, int token) {
    if (kind == BFLOAT16) {
        uint16_t *half = in.half + token * in.ld;
        for (int64_t i = 0; i < width; i++) half[i] = narrow(x[i]);
        for (int64_t i = width; i < padded(width); i++) half[i] = 0;
        if (!TILES) return;
        for (int64_t i = 0; i < width; i += 2) std::memcpy(in.tiles + (i / 2 * MOST + token) * 2, half + i, 4);
    } else if (kind == INT8 || kind == INT4) {
        int16_t *codes = in.codes + token * in.ld;
        for (int64_t block = 0; block * BLOCK < width; block++) {
            alignas(64) float part[BLOCK] = {};
            std::memcpy(part, x + block * BLOCK, 4 * std::min<int64_t>(BLOCK, width - block * BLOCK));
            float largest = 0;
            uint32_t bits[BLOCK], most = 0;  // magnitudes order as their bits do, also those that are no numbers
            std::memcpy(bits, part, sizeof part);
            for (int i = 0; i < BLOCK; i++) most = std::max(most, bits[i] & 0x7fffffff);
            std::memcpy(&largest, &most, 4);
            in.steps[block * MOST + token] = largest / 32767;
            float inverse = largest > 1e-30f && largest < 3e38f ? 32767 / largest : 0;
            alignas(64) int16_t whole[BLOCK];
            for (int i = 0; i < BLOCK; i++) {
                float scaled = inverse == 0 ? 0 : part[i] * inverse;
                whole[i] = int16_t(int32_t(scaled + (scaled < 0 ? -0.5f : 0.5f)));
            }
            for (int i = 0; i < BLOCK; i++) codes[block * BLOCK + i] = whole[column_of(kind, i)];
        }
    }
}

#if WIDE
#include "cpu_wide.hpp"
#else
#include "cpu_plain.hpp"
#endif

template <int T>
void put_rows(const Weight &w, int64_t row, int count, int tokens, const float *sums, const Output &out) {
    float bias[MOST] = {};
    if (w.bias) std::memcpy(bias, w.bias + row, 4 * count);
    for (int t = 0; t < tokens; t++) {
        int64_t place = t * out.ld + row;
        if (out.store == SET_BFLOAT16) {
            uint16_t *to = static_cast<uint16_t *>(out.data) + place;
            for (int r = 0; r < count; r++) to[r] = narrow(sums[r * T + t] + bias[r]);
        } else {
            float *to = static_cast<float *>(out.data) + place;
            if (out.store == SET) for (int r = 0; r < count; r++) to[r] = sums[r * T + t] + bias[r];
            else for (int r = 0; r < count; r++) to[r] += sums[r * T + t] + bias[r];
        }
    }
}

template <int T>
void product_of(const Weight &w, const Input &in, int tokens, int64_t first, int64_t last, const Output &out) {
    constexpr int R = T <= 4 ? 4 : T <= 12 ? 2 : 1;
    alignas(64) float sums[64];
    int64_t row = first;
    if (w.kind == FLOAT32 || w.kind == BFLOAT16) {
        for (; row + R <= last; row += R) {
            w.kind == FLOAT32 ? rows_float<T, R>(w, row, in, sums) : rows_half<T, R>(w, row, in, sums);
            put_rows<T>(w, row, R, tokens, sums, out);
        }
        for (; row < last; row++) {
            w.kind == FLOAT32 ? rows_float<T, 1>(w, row, in, sums) : rows_half<T, 1>(w, row, in, sums);
            put_rows<T>(w, row, 1, tokens, sums, out);
        }
        return;
    }
    for (; row < last; row++) {
        w.kind == INT8 ? row_int8<T>(w, row, in, sums) : row_int4<T>(w, row, in, sums);
        put_rows<T>(w, row, 1, tokens, sums, out);
    }
}

// Rows first .. last of y for these tokens. Inputs have MOST rows, so that more than are asked for may be read.
inline void product(const Weight &w, const Input &in, int tokens, int64_t first, int64_t last, const Output &out) {
#if TILES
    if (uses_tiles(w, tokens)) {
        first = rows_by_tiles(w, in, first, last, [&](int64_t row, int count, const float *sums) {
            put_rows<MOST>(w, row, count, tokens, sums, out);
        });
    }
#endif
    if (tokens == 1) product_of<1>(w, in, tokens, first, last, out);
    else if (tokens == 2) product_of<2>(w, in, tokens, first, last, out);
    else if (tokens <= 4) product_of<4>(w, in, tokens, first, last, out);
    else if (tokens <= 8) product_of<8>(w, in, tokens, first, last, out);
    else if (tokens <= 12) product_of<12>(w, in, tokens, first, last, out);
    else product_of<16>(w, in, tokens, first, last, out);
}
