// Functions of float32 in plain arithmetic, which the compiler vectorises.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// e^x to float32's precision: 2^n * e^r, r within ln 2 / 2, by the series.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    float turns = x * 1.44269504f + 12582912.0f, n = turns - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return sum * power;
}

// ln x of a normal x above zero: n ln 2 + ln m, m from sqrt(1/2) to sqrt(2), by 2 artanh((m - 1) / (m + 1)).
inline float logarithm(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    int32_t n = (bits - 0x3f3504f3) >> 23;
    bits -= n << 23;
    float m;
    std::memcpy(&m, &bits, 4);
    float f = m - 1.0f, s = f / (2.0f + f), z = s * s;
    float rest = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9 + z * (2.0f / 11)))));
    // ln m = f - s (f - rest): what is subtracted is small, so that f's own bits stay.
    float half = 0.5f * f * f, found = f - (half - s * (half + rest));
    return float(n) * 0.693359375f + (found - float(n) * 2.12194440e-4f);
}
