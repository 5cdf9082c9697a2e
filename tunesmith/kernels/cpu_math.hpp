// Functions of vectors of float32, and of whole numbers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu_vectors.hpp"

typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// e^x to float32's precision, of x from -87 to 88; e^-87 below, e^88 above.
inline float exponential(float x) { return exponential_within(std::min(std::max(x, -87.0f), 88.0f)); }

inline Vector exponential(Vector x) {
    Vector least = Vector{} - 87.0f, most = Vector{} + 88.0f;
    return exponential_within(x < least ? least : x > most ? most : x);
}

// ln x of normal x above zero: n ln 2 + ln m, m from sqrt(1/2) to sqrt(2), by 2 artanh((m - 1) / (m + 1)).
inline Vector logarithm(Vector x) {
    Whole bits = (Whole)x, n = (bits - 0x3f3504f3) >> 23;
    Vector m = (Vector)(bits - (n << 23)), turns = __builtin_convertvector(n, Vector);
    Vector f = m - 1.0f, s = f / (f + 2.0f), z = s * s;
    Vector rest = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9 + z * (2.0f / 11)))));
    // ln m = f - (f^2 / 2 - s (f^2 / 2 + rest)): what is subtracted is small, so that f's own bits stay.
    Vector half = 0.5f * f * f, found = f - (half - s * (half + rest));
    return turns * 0.693359375f + (found - turns * 2.12194440e-4f);
}

inline bool any(Whole lanes) {
    Pairs pairs = (Pairs)lanes;
    uint64_t found = 0;
    for (int i = 0; i < LANES / 2; i++) found |= pairs[i];
    return found != 0;
}

// The upper and the lower halves of 16 products of 32 bits.
inline void multiply_wide(Words x, uint64_t by, Words &high, Words &low) {
    const Pairs all = (Pairs)x, mask = Pairs{} + 0xffffffffu;
    Pairs even = (all & mask) * by, odd = (all >> 32) * by;
    high = (Words)((even >> 32) | (odd & ~mask));
    low = (Words)((even & mask) | (odd << 32));
}
