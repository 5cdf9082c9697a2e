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
    float *steps;  // [ld / BLOCK, MOST]
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

inline void put(const Output &out, int token, int64_t row, float value) {
    int64_t place = token * out.ld + row;
    if (out.store == SET) static_cast<float *>(out.data)[place] = value;
    else if (out.store == ADD) static_cast<float *>(out.data)[place] += value;
    else static_cast<uint16_t *>(out.data)[place] = narrow(value);
}

// The column of a block that lies at place p of a row of 16-bit codes, so that words of int4 meet it unshuffled:
// nibbles m and 4 + m of word i are columns 16 m + i and 64 + 16 m + i.
inline int column_of(Kind kind, int place) {
    if (!WIDE || kind != INT4) return place;
    int vector = place / 32, lane = place % 32 / 2;
    return 16 * vector + lane + (place % 2 ? 64 : 0);
}

// One row of x (width values) in the form that products of this kind read.
inline void prepare(Kind kind, const float *x, int64_t width, const Input &in, int token) {
    if (kind == BFLOAT16) {
        uint16_t *half = in.half + token * in.ld;
        for (int64_t i = 0; i < width; i++) half[i] = narrow(x[i]);
        for (int64_t i = width; i < padded(width); i++) half[i] = 0;
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
// The sums of 16 vectors, in their order.
inline __m512 sums_of(const __m512 *v) {
    __m512 quad[4];
    for (int i = 0; i < 4; i++) {
        const __m512 *a = v + 4 * i;
        __m512 s = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        __m512 r = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        __m512d sd = _mm512_castps_pd(s), rd = _mm512_castps_pd(r);
        quad[i] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(sd, rd)), _mm512_castpd_ps(_mm512_unpackhi_pd(sd, rd)));
    }
    auto halves = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return halves(halves(quad[0], quad[1]), halves(quad[2], quad[3]));
}

template <int COUNT>
inline void sums_to(const __m512 *v, float *out) {
    if (COUNT < 4) {
        for (int i = 0; i < COUNT; i++) out[i] = _mm512_reduce_add_ps(v[i]);
        return;
    }
    for (int start = 0; start < COUNT; start += 16) {
        __m512 part[16];
        for (int i = 0; i < 16; i++) part[i] = start + i < COUNT ? v[start + i] : _mm512_setzero_ps();
        _mm512_storeu_ps(out + start, sums_of(part));
    }
}

inline __m512bh load_half(const uint16_t *from, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

template <int T, int R>
void rows_float(const Weight &w, int64_t row, const Input &in, float *out) {
    const float *data = static_cast<const float *>(w.data) + row * w.width;
    __m512 sum[R * T];
    for (auto &s : sum) s = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.width; k += 16) {
        __mmask16 mask = w.width - k >= 16 ? 0xffff : (1u << (w.width - k)) - 1;
        __m512 weight[R];
        for (int r = 0; r < R; r++) {
            weight[r] = _mm512_maskz_loadu_ps(mask, data + r * w.width + k);
            _mm_prefetch((const char *)(data + (r + R) * w.width + k), _MM_HINT_T0);
        }
        for (int t = 0; t < T; t++) {
            __m512 x = _mm512_maskz_loadu_ps(mask, in.wide + t * in.wide_ld + k);
            for (int r = 0; r < R; r++) sum[r * T + t] = _mm512_fmadd_ps(weight[r], x, sum[r * T + t]);
        }
    }
    sums_to<R * T>(sum, out);
}

template <int T, int R>
void rows_half(const Weight &w, int64_t row, const Input &in, float *out) {
    const uint16_t *data = static_cast<const uint16_t *>(w.data) + row * w.width;
    __m512 sum[R * T];
    for (auto &s : sum) s = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.width; k += 32) {
        __mmask32 mask = w.width - k >= 32 ? 0xffffffffu : (1u << (w.width - k)) - 1;
        __m512bh weight[R];
        for (int r = 0; r < R; r++) {
            weight[r] = load_half(data + r * w.width + k, mask);
            _mm_prefetch((const char *)(data + (r + R) * w.width + k), _MM_HINT_T0);
        }
        for (int t = 0; t < T; t++) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(in.half + t * in.ld + k);
            for (int r = 0; r < R; r++) sum[r * T + t] = _mm512_dpbf16_ps(sum[r * T + t], weight[r], x);
        }
    }
    sums_to<R * T>(sum, out);
}

template <int T>
inline void add_block(const __m512i *codes, int count, const Input &in, int64_t block, __m512 scale, __m512 *sum) {
    for (int t = 0; t < T; t++) {
        const int16_t *x = in.codes + t * in.ld + block * BLOCK;
        __m512i whole = _mm512_setzero_si512();
        for (int m = 0; m < count; m++) {
            whole = _mm512_dpwssd_epi32(whole, codes[m], _mm512_loadu_si512(x + 32 * (m % 4)));
        }
        __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(in.steps[block * MOST + t]));
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), step, sum[t]);
    }
}

template <int T>
void row_int8(const Weight &w, int64_t row, const Input &in, float *out) {
    const int8_t *data = static_cast<const int8_t *>(w.data) + row * w.width;
    __m512 sum[T], scale = _mm512_set1_ps(w.scale[row]);
    for (auto &s : sum) s = _mm512_setzero_ps();
    for (int64_t block = 0; block * BLOCK < w.width; block++) {
        __m512i codes[4];
        for (int m = 0; m < 4; m++) {
            int64_t k = block * BLOCK + 32 * m, left = w.width - k;
            __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
            codes[m] = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, data + k));
        }
        _mm_prefetch((const char *)(data + block * BLOCK + 2048), _MM_HINT_T0);
        _mm_prefetch((const char *)(data + block * BLOCK + 2112), _MM_HINT_T0);
        add_block<T>(codes, 4, in, block, scale, sum);
    }
    sums_to<T>(sum, out);
}

template <int T>
void row_int4(const Weight &w, int64_t row, const Input &in, float *out) {
    int64_t groups = padded(w.width) / w.group, each = BLOCK / w.group;
    const int32_t *words = static_cast<const int32_t *>(w.data) + row * (padded(w.width) / 8);
    const __m512i nibbles = _mm512_set1_epi32(0x000f000f), low = _mm512_set1_epi32(0xffff);
    __m512 sum[T];
    for (auto &s : sum) s = _mm512_setzero_ps();
    for (int64_t block = 0; block * BLOCK < w.width; block++) {
        __m512i word = _mm512_loadu_si512(words + 16 * block), codes[4];
        _mm_prefetch((const char *)(words + 16 * block + 512), _MM_HINT_T0);
        const float *scale = w.scale + row * groups + block * each;
        const uint8_t *zeros = w.zeros ? w.zeros + row * groups + block * each : nullptr;
        for (int m = 0; m < 4; m++) {
            int first = zeros ? zeros[16 * m / w.group] : 8, second = zeros ? zeros[(64 + 16 * m) / w.group] : 8;
            __m512i zero = _mm512_set1_epi32(first | second << 16);
            codes[m] = _mm512_sub_epi16(_mm512_and_si512(_mm512_srli_epi32(word, 4 * m), nibbles), zero);
        }
        if (each == 1) {
            add_block<T>(codes, 4, in, block, _mm512_set1_ps(scale[0]), sum);
            continue;
        }
        for (int g = 0; g < each; g++) {  // a pair's columns are of two groups: the other one's code is made zero
            __m512i part[4];
            for (int m = 0; m < 4; m++) {
                bool has_low = 16 * m / w.group == g, has_high = (64 + 16 * m) / w.group == g;
                part[m] = has_low    ? _mm512_and_si512(codes[m], low)
                          : has_high ? _mm512_andnot_si512(low, codes[m])
                                     : _mm512_setzero_si512();
            }
            add_block<T>(part, 4, in, block, _mm512_set1_ps(scale[g]), sum);
        }
    }
    sums_to<T>(sum, out);
}
#else
template <int T, class Value>
void row_plain(const Value *data, const Weight &w, const Input &in, float *out) {
    constexpr int LANES = 16;
    float sum[T][LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= w.width; k += LANES) {
        float weight[LANES];
        for (int i = 0; i < LANES; i++) weight[i] = widen(data[k + i]);
        for (int t = 0; t < T; t++) {
            const float *x = in.wide + t * in.wide_ld + k;
            for (int i = 0; i < LANES; i++) sum[t][i] += weight[i] * x[i];
        }
    }
    for (int t = 0; t < T; t++) {
        float total = 0;
        for (int i = 0; i < LANES; i++) total += sum[t][i];
        for (int64_t i = k; i < w.width; i++) total += widen(data[i]) * in.wide[t * in.wide_ld + i];
        out[t] = total;
    }
}

template <int T, int R>
void rows_float(const Weight &w, int64_t row, const Input &in, float *out) {
    for (int r = 0; r < R; r++)
        row_plain<T>(static_cast<const float *>(w.data) + (row + r) * w.width, w, in, out + r * T);
}

template <int T, int R>
void rows_half(const Weight &w, int64_t row, const Input &in, float *out) {
    for (int r = 0; r < R; r++)
        row_plain<T>(static_cast<const uint16_t *>(w.data) + (row + r) * w.width, w, in, out + r * T);
}

inline int32_t sum_of(const int16_t *codes, const int16_t *x, int count) {
    int32_t sum = 0;
    for (int i = 0; i < count; i++) sum += int32_t(codes[i]) * int32_t(x[i]);
    return sum;
}

template <int T>
void row_int8(const Weight &w, int64_t row, const Input &in, float *out) {
    const int8_t *data = static_cast<const int8_t *>(w.data) + row * w.width;
    std::fill(out, out + T, 0.0f);
    for (int64_t block = 0; block * BLOCK < w.width; block++) {
        int16_t codes[BLOCK] = {};
        int64_t count = std::min<int64_t>(BLOCK, w.width - block * BLOCK);
        for (int64_t i = 0; i < count; i++) codes[i] = data[block * BLOCK + i];
        for (int t = 0; t < T; t++) {
            int32_t sum = sum_of(codes, in.codes + t * in.ld + block * BLOCK, BLOCK);
            out[t] += float(sum) * (w.scale[row] * in.steps[block * MOST + t]);
        }
    }
}

template <int T>
void row_int4(const Weight &w, int64_t row, const Input &in, float *out) {
    int64_t groups = padded(w.width) / w.group;
    const uint32_t *words = static_cast<const uint32_t *>(w.data) + row * (padded(w.width) / 8);
    std::fill(out, out + T, 0.0f);
    for (int64_t block = 0; block * BLOCK < w.width; block++) {
        int16_t codes[BLOCK];
        for (int j = 0; j < 8; j++) {
            int64_t group = row * groups + (block * BLOCK + 16 * j) / w.group;
            int zero = w.zeros ? w.zeros[group] : 8;
            for (int i = 0; i < 16; i++) codes[16 * j + i] = int16_t(int(words[16 * block + i] >> (4 * j) & 15) - zero);
        }
        for (int start = 0; start < BLOCK; start += int(w.group)) {
            float scale = w.scale[row * groups + (block * BLOCK + start) / w.group];
            for (int t = 0; t < T; t++) {
                int32_t sum = sum_of(codes + start, in.codes + t * in.ld + block * BLOCK + start, int(w.group));
                out[t] += float(sum) * (scale * in.steps[block * MOST + t]);
            }
        }
    }
}
#endif

template <int T>
void put_rows(const Weight &w, int64_t row, int count, int tokens, const float *sums, const Output &out) {
    for (int r = 0; r < count; r++) {
        float bias = w.bias ? w.bias[row + r] : 0.0f;
        for (int t = 0; t < tokens; t++) put(out, t, row + r, sums[r * T + t] + bias);
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
    if (tokens == 1) product_of<1>(w, in, tokens, first, last, out);
    else if (tokens == 2) product_of<2>(w, in, tokens, first, last, out);
    else if (tokens <= 4) product_of<4>(w, in, tokens, first, last, out);
    else if (tokens <= 8) product_of<8>(w, in, tokens, first, last, out);
    else if (tokens <= 12) product_of<12>(w, in, tokens, first, last, out);
    else product_of<16>(w, in, tokens, first, last, out);
}
