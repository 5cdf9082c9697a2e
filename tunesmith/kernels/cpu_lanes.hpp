// Rows of products of 9 to 16 tokens in bfloat16, each token a lane: what cpu_products.hpp includes. Two columns of a
// row meet those of all tokens at once, so that nothing is added up across lanes. What is made of x and of the sums is
// the matrix unit's too.
#pragma once

// Four bytes of a token go to each row of a tile of x.
inline void scatter(const void *from, int rows, int token, void *tile) {
    uint32_t four[16];
    std::memcpy(four, from, 4 * rows);
    for (int i = 0; i < rows; i++) static_cast<uint32_t *>(tile)[i * MOST + token] = four[i];
}

// Columns first .. last of one token, in bfloat16.
inline void prepare_lanes(const float *x, const Input &in, int token, int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k += 16) {
        __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
        scatter(&half, 8, token, in.tiles + k * MOST);
    }
}

// Rows from .. to of the 16 that begin at `row`; sums: a row's of all tokens each, left transposed.
inline void put_tile(
    const Weight &w, int64_t row, int64_t from, int64_t to, int tokens, __m512 *sums, const Output &out) {
    __mmask16 mask = ((1u << (to - row)) - 1) & ~((1u << (from - row)) - 1);
    __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + row) : _mm512_setzero_ps();
    __m512 factors = _mm512_set1_ps(1);
    if (factors_of(w)) factors = _mm512_maskz_loadu_ps(mask, w.scale + row);
    transpose(sums);
    for (int t = 0; t < tokens; t++) {
        int64_t place = t * out.ld + row;
        __m512 y = _mm512_fmadd_ps(sums[t], factors, bias);
        if (out.store == SET_BFLOAT16) {
            __m256i half = (__m256i)_mm512_cvtneps_pbh(y);
            _mm256_mask_storeu_epi16(static_cast<uint16_t *>(out.data) + place, mask, half);
            continue;
        }
        float *to_row = static_cast<float *>(out.data) + place;
        if (out.store == ADD) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, to_row));
        _mm512_mask_storeu_ps(to_row, mask, y);
    }
}

// Sums of 8 rows.
inline void rows_by_lanes(const Weight &w, int64_t row, const Input &in, __m512 *out) {
    constexpr int R = 8;
    const uint16_t *data = static_cast<const uint16_t *>(w.data) + row * w.width;
    __m512 sum[R];
    each<R>([&](auto r) { sum[r] = _mm512_setzero_ps(); });
    for (int64_t start = 0; start < w.width; start += 8) {
        ask_for<R / 4>(data + R * start);
        for (int64_t k = start; k < start + 8; k += 2) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(in.tiles + k * MOST);
            each<R>([&](auto r) {
                int32_t pair;
                std::memcpy(&pair, data + r * w.width + k, 4);
                sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(pair), x);
            });
        }
    }
    each<R>([&](auto r) { out[r] = sum[r]; });
}

inline void by_lanes(const Weight &w, const Input &in, int tokens, int64_t row, int64_t last, const Output &out) {
    __m512 sums[16];
    for (; row < last; row += 16) {  // of the last ones, some may be there already
        int64_t from = std::max<int64_t>(0, std::min(row, last - 16));
        rows_by_lanes(w, from, in, sums);
        rows_by_lanes(w, from + 8, in, sums + 8);
        put_tile(w, from, row, std::min(last, row + 16), tokens, sums, out);
    }
}
