// What a step does to one row of values: its norm, its turn, its bits.
#pragma once
#include <cmath>

#include "cpu_products.hpp"
#include "cpu_vectors.hpp"

inline float total(const float *lanes) {
    float half[LANES / 2], sum = 0;
    for (int i = 0; i < LANES / 2; i++) half[i] = lanes[i] + lanes[i + LANES / 2];
    for (int i = 0; i < LANES / 2; i++) sum += half[i];
    return sum;
}

inline float dot(const float *a, const float *b, int64_t count) {
    Vector sum = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += *(const Vector *)(a + i) * *(const Vector *)(b + i);
    for (; i < count; i++) rest += a[i] * b[i];
    return total((const float *)&sum) + rest;
}

inline void norm(const float *x, const float *weight, int64_t width, float eps, float *out) {
    float scale = 1.0f / std::sqrt(dot(x, x, width) / float(width) + eps);
    for (int64_t i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
}

inline float rounded(float x, bool is_half) { return is_half ? widen(narrow(x)) : x; }

inline void rotate(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + half] = second * cosine[i] + first * sine[i];
    }
}

template <class Value>
inline void widen_all(const Value *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) to[i] = widen(from[i]);
}

inline void write_all(const float *from, int64_t count, void *to, int64_t place, bool is_half) {
    if (!is_half) std::memcpy(static_cast<float *>(to) + place, from, 4 * count);
    else for (int64_t i = 0; i < count; i++) static_cast<uint16_t *>(to)[place + i] = narrow(from[i]);
}
