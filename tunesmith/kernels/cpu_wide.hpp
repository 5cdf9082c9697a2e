// Rows of products with AVX-512, and with the matrix unit: what cpu_products.hpp includes.
#pragma once

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

#if TILES
// Rows by 64 for up to 16 tokens; returns the first that is left. A tile of the weight as it lies is 16 rows of 32
// columns, one of x 16 pairs of columns of 16 tokens, and their product 16 rows of 16 tokens.
template <class Put>
inline int64_t rows_by_tiles(const Weight &w, const Input &in, int64_t row, int64_t last, const Put &put_tile) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
    const uint16_t *data = static_cast<const uint16_t *>(w.data);
    alignas(64) float sums[4][256];
    for (; row + 64 <= last; row += 64) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const uint16_t *from = data + row * w.width;
        int64_t stride = 2 * w.width, next = 16 * w.width;
        for (int64_t k = 0; k < w.width; k += 32) {
            _tile_loadd(4, in.tiles + k * MOST, 64);
            _tile_loadd(5, from + k, stride);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, from + next + k, stride);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(7, from + 2 * next + k, stride);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, from + 3 * next + k, stride);
            _tile_dpbf16ps(3, 5, 4);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int i = 0; i < 4; i++) put_tile(row + 16 * i, 16, sums[i]);
    }
    for (; row + 16 <= last; row += 16) {
        _tile_zero(0);
        for (int64_t k = 0; k < w.width; k += 32) {
            _tile_loadd(4, in.tiles + k * MOST, 64);
            _tile_loadd(5, data + row * w.width + k, 2 * w.width);
            _tile_dpbf16ps(0, 5, 4);
        }
        _tile_stored(0, sums[0], 64);
        put_tile(row, 16, sums[0]);
    }
    _tile_release();
    return row;
}
#endif

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
        int32_t zero[4];  // of a pair's two columns
        if (each == 1 || !zeros) std::fill(zero, zero + 4, (zeros ? zeros[0] : 8) * 0x10001);
        else for (int m = 0; m < 4; m++) zero[m] = zeros[m * each / 8] | zeros[(4 + m) * each / 8] << 16;
        for (int m = 0; m < 4; m++) {
            __m512i pair = _mm512_and_si512(_mm512_srli_epi32(word, 4 * m), nibbles);
            codes[m] = _mm512_sub_epi16(pair, _mm512_set1_epi32(zero[m]));
        }
        if (each == 1) {
            add_block<T>(codes, 4, in, block, _mm512_set1_ps(scale[0]), sum);
            continue;
        }
        for (int g = 0; g < each; g++) {  // a pair's columns are of two groups: the other one's code is made zero
            __m512i part[4];
            for (int m = 0; m < 4; m++) {
                bool has_low = m * each / 8 == g, has_high = (4 + m) * each / 8 == g;
                part[m] = has_low    ? _mm512_and_si512(codes[m], low)
                          : has_high ? _mm512_andnot_si512(low, codes[m])
                                     : _mm512_setzero_si512();
            }
            add_block<T>(part, 4, in, block, _mm512_set1_ps(scale[g]), sum);
        }
    }
    sums_to<T>(sum, out);
}
