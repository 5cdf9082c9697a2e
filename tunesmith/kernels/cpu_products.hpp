// Products of 1 to 16 tokens with a weight as it lies, each row of it read once for all tokens. Sums in float32.
//
//     float32   fma                                       x float32
//     bfloat16  pairs of products                         x rounded to bfloat16
//     int8      sums in int32                             x = q * step, q of 16 bits, a step for each token
//     int4      code - zero, sums in int32 by groups      likewise
//
// A step of 16 bits is exact to max |x| / 65534 (bfloat16: |x| / 512). Where a unit multiplies bytes, q is two of
// them: q = 256 high + low, low without a sign. With AVX-512 that has bfloat16 and VNNI products go through intrinsics,
// and of several tokens through the matrix unit where there is one; elsewhere plain loops, which the compiler
// vectorises.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu_unit.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define WIDE 1
#include <immintrin.h>
#else
#define WIDE 0
#endif

#if WIDE && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define TILES 1
#else
#define TILES 0
#endif

constexpr int MOST = 16;    // tokens
constexpr int BLOCK = 128;  // columns of a block of int4 words; rows of x are padded to it
constexpr int FINEST = 32;  // the least group of columns with a scale

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };
enum Store { SET, ADD, SET_BFLOAT16 };

struct Weight {  // y = x @ w.T + bias, w [rows, width]
    int64_t kind, rows, width, group;
    const void *data;
    const float *scale;    // int8: a row's; int4: [rows, padded width / group]; else a factor of each row, or none
    const uint8_t *zeros;  // int4: like scale, or none: 8 everywhere
    const float *bias;
};

struct Input {  // what a product reads of up to MOST tokens, in the form of its kind
    const float *wide;
    int64_t wide_ld, ld;
    uint16_t *half;   // [MOST, ld]
    uint16_t *tiles;  // bfloat16 as tiles are: [ld / 32, 16 pairs of columns, MOST, 2]
    int16_t *codes;   // [MOST, ld], or the bytes of as many
    float *steps;     // [MOST]
    float *sums;      // int4: codes added up by groups, [MOST, ld / FINEST]; for the matrix unit [groups, MOST]
};

struct Output {
    void *data;
    int64_t ld;
    Store store;
};

inline const float *factors_of(const Weight &w) { return w.kind <= BFLOAT16 ? w.scale : nullptr; }

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

inline bool has_tiles() { return TILES && may_use_unit(); }

// Whether products of so many tokens go through it.
inline bool uses_tiles(const Weight &w, int64_t tokens) {
    static constexpr int FROM[] = {MOST + 1, 4, 2, 3};  // tokens from which it is faster, by kind
    int64_t unit = w.kind == BFLOAT16 ? 32 : w.kind == INT8 ? 64 : 1;
    // No sum of 255 * 127 may leave 32 bits.
    return has_tiles() && tokens >= FROM[w.kind] && w.rows >= 16 && w.width % unit == 0 && w.width <= 65536;
}

// Whether they go by lanes of tokens, without it.
inline bool uses_lanes(const Weight &w, int64_t tokens) {
    return WIDE && !has_tiles() && w.kind == BFLOAT16 && tokens > 8 && w.rows >= 16 && w.width % 32 == 0;
}

// Whether x is read by columns of all tokens, and not token by token.
inline bool goes_by_columns(const Weight &w, int64_t tokens) { return uses_tiles(w, tokens) || uses_lanes(w, tokens); }

// What a code of 16 bits stands for, and its inverse, by the largest of a row of x; a row with what is no number has no
// finite step.
inline float step_of(const float *x, int64_t width, float &inverse) {
    uint32_t most = 0;  // magnitudes order as their bits do, also those that are no numbers
    for (int64_t i = 0; i < width; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        most = std::max(most, bits & 0x7fffffff);
    }
    float largest;
    std::memcpy(&largest, &most, 4);
    inverse = largest > 1e-30f && largest <= std::numeric_limits<float>::max() ? 32767 / largest : 0;
    return largest / 32767;
}

inline void to_codes(const float *x, int64_t width, float inverse, int16_t *codes) {
    for (int64_t i = 0; i < width; i++) {
        float scaled = inverse == 0 ? 0 : x[i] * inverse;
        codes[i] = int16_t(int32_t(scaled + (scaled < 0 ? -0.5f : 0.5f)));
    }
    for (int64_t i = width; i < padded(width); i++) codes[i] = 0;
}

#if WIDE
#include "cpu_wide.hpp"

#include "cpu_lanes.hpp"
#if TILES
#include "cpu_tiles.hpp"
#endif
#else
#include "cpu_plain.hpp"
#endif

// One row of x (w.width values) as products row by row read it.
inline void prepare_row(const Weight &w, const float *x, const Input &in, int64_t token) {
    if (w.kind == FLOAT32) return;
    if (w.kind == BFLOAT16) {
        uint16_t *half = in.half + token * in.ld;
        for (int64_t i = 0; i < w.width; i++) half[i] = narrow(x[i]);
        for (int64_t i = w.width; i < padded(w.width); i++) half[i] = 0;
        return;
    }
    float inverse;
    in.steps[token] = step_of(x, w.width, inverse);
    int16_t *codes = in.codes + token * in.ld;
    if (w.kind == INT8) to_codes(x, w.width, inverse, codes);
    else prepare_int4(w, x, inverse, codes, in.sums + token * (in.ld / FINEST));
}

// A thread's share of x [tokens, ld] in the form that products of so many tokens with this weight read: of every
// `threads`th token, so that a thread needs but its own; for the matrix unit, whose tiles hold all tokens in each line,
// of columns of all of them.
inline void prepare(const Weight &w, const float *x, int64_t ld, const Input &in, int64_t tokens, int me, int threads) {
#if WIDE
    if (goes_by_columns(w, tokens)) {
        int64_t blocks = padded(w.width) / BLOCK, first = blocks * me / threads, last = blocks * (me + 1) / threads;
        for (int64_t t = 0; t < tokens; t++) {
            float inverse = 0, step = w.kind == BFLOAT16 ? 0 : step_of(x + t * ld, w.width, inverse);
            if (me == 0) in.steps[t] = step;
#if TILES
            prepare_tiles(w, x + t * ld, inverse, in, int(t), first * BLOCK, last * BLOCK);
#else
            prepare_lanes(x + t * ld, in, int(t), first * BLOCK, std::min(last * BLOCK, w.width));
#endif
        }
        return;
    }
#endif
    for (int64_t t = me; t < tokens; t += threads) prepare_row(w, x + t * ld, in, t);
}

template <int T>
void put_rows(const Weight &w, int64_t row, int count, int tokens, const float *sums, const Output &out) {
    float bias[MOST] = {}, scaled[MOST];
    if (w.bias) std::memcpy(bias, w.bias + row, 4 * count);
    const float *factors = factors_of(w);
    for (int t = 0; t < tokens; t++) {
        for (int r = 0; r < count; r++) scaled[r] = factors ? sums[r * T + t] * factors[row + r] : sums[r * T + t];
        int64_t place = t * out.ld + row;
        if (out.store == SET_BFLOAT16) {
            uint16_t *to = static_cast<uint16_t *>(out.data) + place;
            for (int r = 0; r < count; r++) to[r] = narrow(scaled[r] + bias[r]);
        } else {
            float *to = static_cast<float *>(out.data) + place;
            if (out.store == SET) for (int r = 0; r < count; r++) to[r] = scaled[r] + bias[r];
            else for (int r = 0; r < count; r++) to[r] += scaled[r] + bias[r];
        }
    }
}

// sums[r, t] of R rows of any kind.
template <int T, int R>
void rows_of(const Weight &w, int64_t row, const Input &in, float *sums) {
    if (w.kind == FLOAT32) rows_float<T, R>(w, row, in, sums);
    else if (w.kind == BFLOAT16) rows_half<T, R>(w, row, in, sums);
    else if (w.kind == INT8) rows_int8<T, R>(w, row, in, sums);
    else if (w.group == 128) rows_int4<T, R, 1>(w, row, in, sums);
    else if (w.group == 64) rows_int4<T, R, 2>(w, row, in, sums);
    else rows_int4<T, R, 4>(w, row, in, sums);
}

template <int T>
void product_of(const Weight &w, const Input &in, int tokens, int64_t first, int64_t last, const Output &out) {
    constexpr int SOME = T <= 4 ? 4 : T <= 12 ? 2 : 1, MANY = T >= 16 ? 1 : 16 / T;
    alignas(64) float sums[64];
    int64_t row = first;
    auto by = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; row + R <= last; row += R) {
            rows_of<T, R>(w, row, in, sums);
            put_rows<T>(w, row, R, tokens, sums, out);
        }
    };
    if (w.kind >= INT8) by(std::integral_constant<int, MANY>());
    by(std::integral_constant<int, SOME>());
    by(std::integral_constant<int, 1>());
}

#if WIDE
template <int T, int R, int ASKS>
void rows_by_turns(const Weight &w, int64_t row, const Input &in, float *sums) {
    if (w.kind == FLOAT32) rows_float<T, R, ASKS, 2>(w, row, in, sums);
    else rows_half<T, R, ASKS, 2>(w, row, in, sums);
}

// 9 to 8 + REST tokens, floating point: eight and then the rest of them by R rows, so that a line of either is loaded
// once for several products.
template <int R, int REST>
int64_t by_eights(const Weight &w, const Input &in, int tokens, int64_t row, int64_t last, const Output &out) {
    alignas(64) float sums[64];
    Input rest = in;
    rest.half += 8 * in.ld;
    rest.wide += 8 * in.wide_ld;
    Output behind = out;
    behind.data = static_cast<char *>(out.data) + 8 * out.ld * (out.store == SET_BFLOAT16 ? 2 : 4);
    for (; row + R <= last; row += R) {
        rows_by_turns<8, R, 0>(w, row, in, sums);
        put_rows<8>(w, row, R, 8, sums, out);
        rows_by_turns<REST, R, 1>(w, row, rest, sums);
        put_rows<REST>(w, row, R, tokens - 8, sums, behind);
    }
    return row;
}

template <int REST>
void by_eights(const Weight &w, const Input &in, int tokens, int64_t first, int64_t last, const Output &out) {
    by_eights<1, REST>(w, in, tokens, by_eights<3, REST>(w, in, tokens, first, last, out), last, out);
}
#endif

// Rows first .. last of y for these tokens. Inputs have MOST rows, so that more than are asked for may be read.
inline void product(const Weight &w, const Input &in, int tokens, int64_t first, int64_t last, const Output &out) {
#if TILES
    if (uses_tiles(w, tokens)) return by_tiles(w, in, tokens, first, last, out);
#endif
#if WIDE
    if (uses_lanes(w, tokens)) return by_lanes(w, in, tokens, first, last, out);
    if (w.kind <= BFLOAT16 && tokens > 12) return by_eights<8>(w, in, tokens, first, last, out);
    if (w.kind <= BFLOAT16 && tokens > 8) return by_eights<4>(w, in, tokens, first, last, out);
#endif
    if (tokens == 1) product_of<1>(w, in, tokens, first, last, out);
    else if (tokens == 2) product_of<2>(w, in, tokens, first, last, out);
    else if (tokens <= 4) product_of<4>(w, in, tokens, first, last, out);
    else if (tokens <= 8) product_of<8>(w, in, tokens, first, last, out);
    else if (tokens <= 12) product_of<12>(w, in, tokens, first, last, out);
    else product_of<16>(w, in, tokens, first, last, out);
}
