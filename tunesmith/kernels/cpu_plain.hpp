// Rows of products in plain loops, for the compiler to vectorise: what cpu_products.hpp includes.
#pragma once

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
