// Vectors of 16 numbers as compilers know them for any processor, and the exponential of float32.
#pragma once
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

template <class T>
inline T series_of_exponential(T r) {
    T sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    return sum * r + 1.0f;
}

// e^x of x from -87 to 88 to float32's precision: 2^n * e^r, r within ln 2 / 2, by the series.
inline float exponential_within(float x) {
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return series_of_exponential(r) * power;
}

inline Vector exponential_within(Vector x) {
    Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    return series_of_exponential(r) * (Vector)((__builtin_convertvector(n, Whole) + 127) << 23);
}
