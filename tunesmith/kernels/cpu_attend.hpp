// Attention of one token over pages: the query heads that read one key head.
#pragma once
#include <vector>

#include "cpu_model.hpp"
#include "cpu_row.hpp"

// The products of a query with 16 keys.
inline void scores_of(const float *query, const float *keys, int64_t ld, float *out) {
    Vector sum[LANES] = {};
    for (int64_t i = 0; i < ld; i += LANES) {
        Vector q = *(const Vector *)(query + i);
        for (int l = 0; l < LANES; l++) sum[l] += q * *(const Vector *)(keys + l * ld + i);
    }
#if WIDE
    __m512 v[LANES];
    std::memcpy(v, sum, sizeof v);
    _mm512_storeu_ps(out, sums_of(v));
#else
    for (int l = 0; l < LANES; l++) out[l] = total((const float *)&sum[l]);
#endif
}

// out += what 16 values weigh.
inline void mix(const float *weights, const float *values, int64_t ld, float *out) {
    for (int64_t i = 0; i < ld; i += LANES) {
        Vector sum = *(const Vector *)(out + i);
        for (int l = 0; l < LANES; l++) sum += weights[l] * *(const Vector *)(values + l * ld + i);
        *(Vector *)(out + i) = sum;
    }
}

// Softmax of `count` scores; zero behind them, up to `places`.
inline void soften(float *score, int64_t count, int64_t places) {
    for (int64_t i = count; i < places; i++) score[i] = -INFINITY;
    Vector most = *(const Vector *)score, sum = {};
    for (int64_t i = LANES; i < places; i += LANES) {
        Vector x = *(const Vector *)(score + i);
        most = x > most ? x : most;
    }
    float largest = most[0];
    for (int l = 1; l < LANES; l++) largest = std::max(largest, most[l]);
    for (int64_t i = 0; i < places; i++) score[i] = exponential(score[i] - largest);
    for (int64_t i = count; i < places; i++) score[i] = 0;
    for (int64_t i = 0; i < places; i += LANES) sum += *(const Vector *)(score + i);
    float inverse = 1.0f / total((const float *)&sum);
    for (int64_t i = 0; i < places; i++) score[i] *= inverse;
}

// out [group, head_dim] of queries of the same shape, as they were turned, over the first `last` tokens of a table.
inline void attend_one(const Model &m, const Layer &layer, const int32_t *table, int64_t last, int64_t kv,
                       const float *query, float *to, std::vector<float> &room) {
    int64_t H = m.head_dim, ld = (H + LANES - 1) / LANES * LANES, group = m.heads / m.kv_heads;
    int64_t first = layer.window ? std::max<int64_t>(0, last - layer.window) : 0, row = m.kv_heads * H;
    int64_t count = last - first, places = (count + LANES - 1) / LANES * LANES;
    room.resize(std::max<size_t>(room.size(), group * (places + 2 * ld) + LANES * ld));
    float *score = room.data(), *own = score + group * places, *out = own + group * ld, *wide = out + group * ld;
    std::fill(own, own + (2 * group + LANES) * ld, 0.0f);
    float scale = 1.0f / std::sqrt(float(H));
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < H; i++) own[g * ld + i] = query[g * H + i] * scale;
    auto gather = [&](const void *pages, int64_t start) {  // the rows of 16 places; zero behind the last
        for (int64_t l = 0; l < LANES; l++) {
            int64_t p = first + start + l;
            if (p >= last) {
                std::fill(wide + l * ld, wide + l * ld + H, 0.0f);
                continue;
            }
            int64_t place = (table[p / m.page_slots] * m.page_slots + p % m.page_slots) * row + kv * H;
            if (m.is_half) widen_all(static_cast<const uint16_t *>(pages) + place, H, wide + l * ld);
            else widen_all(static_cast<const float *>(pages) + place, H, wide + l * ld);
        }
    };
    for (int64_t start = 0; start < count; start += LANES) {
        gather(layer.keys, start);
        for (int64_t g = 0; g < group; g++) scores_of(own + g * ld, wide, ld, score + g * places + start);
    }
    for (int64_t g = 0; g < group; g++) soften(score + g * places, count, places);
    for (int64_t start = 0; start < count; start += LANES) {
        gather(layer.values, start);
        for (int64_t g = 0; g < group; g++) mix(score + g * places + start, wide, ld, out + g * ld);
    }
    for (int64_t g = 0; g < group; g++) std::memcpy(to + g * H, out + g * ld, 4 * H);
}
