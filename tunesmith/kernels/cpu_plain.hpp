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

template <int T, int R>
void rows_int8(const Weight &w, int64_t row, const Input &in, float *out) {
    const int8_t *data = static_cast<const int8_t *>(w.data) + row * w.width;
    for (int r = 0; r < R; r++, data += w.width, out += T) {
        std::fill(out, out + T, 0.0f);
        for (int64_t start = 0; start < w.width; start += BLOCK) {
            int16_t codes[BLOCK] = {};
            int64_t count = std::min<int64_t>(BLOCK, w.width - start);
            for (int64_t i = 0; i < count; i++) codes[i] = data[start + i];
            for (int t = 0; t < T; t++) out[t] += float(sum_of(codes, in.codes + t * in.ld + start, BLOCK));
        }
        for (int t = 0; t < T; t++) out[t] *= w.scale[row + r] * in.steps[t];
    }
}

inline void prepare_int4(const Weight &w, const float *x, float inverse, int16_t *codes, float *) {
    to_codes(x, w.width, inverse, codes);
}

// GROUPS: of a block.
template <int T, int R, int GROUPS>
void rows_int4(const Weight &w, int64_t row, const Input &in, float *out) {
    constexpr int EACH = BLOCK / GROUPS;
    int64_t blocks = padded(w.width) / BLOCK;
    for (int r = 0; r < R; r++, out += T) {
        std::fill(out, out + T, 0.0f);
        for (int64_t block = 0; block < blocks; block++) {
            const uint32_t *words = static_cast<const uint32_t *>(w.data) + ((row + r) * blocks + block) * 16;
            int64_t group = ((row + r) * blocks + block) * GROUPS;
            int16_t codes[BLOCK];
            for (int j = 0; j < 8; j++) {
                int zero = w.zeros ? w.zeros[group + 16 * j / EACH] : 8;
                for (int i = 0; i < 16; i++) codes[16 * j + i] = int16_t(int(words[i] >> (4 * j) & 15) - zero);
            }
            for (int g = 0; g < GROUPS; g++) {
                for (int t = 0; t < T; t++) {
                    const int16_t *x = in.codes + t * in.ld + block * BLOCK + g * EACH;
                    out[t] += float(sum_of(codes + g * EACH, x, EACH)) * w.scale[group + g];
                }
            }
        }
        for (int t = 0; t < T; t++) out[t] *= in.steps[t];
    }
}
