// Some rows of a weight as bfloat16 for products of many tokens (cpu_panels.hpp): where they lie, or, of codes, made in
// a thread's own memory, which stays in its cache while all tokens of a part meet them.
//
//     int8   the code, which bfloat16 holds exactly; sums are scaled
//     int4   (code - zero) * scale, rounded once: a group has 16 such numbers, and a code is the place of its own
#pragma once
#include "cpu_panels.hpp"

#if WIDE

inline void widen_int8_row(const int8_t *codes, int64_t width, uint16_t *to) {
    auto floats = [](__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); };
    for (int64_t k = 0; k < width; k += 32) {
        uint32_t mask = width - k >= 32 ? 0xffffffffu : (1u << (width - k)) - 1;
        __m512 low = floats(_mm_maskz_loadu_epi8(__mmask16(mask), codes + k));
        __m512 high = floats(_mm_maskz_loadu_epi8(__mmask16(mask >> 16), codes + k + 16));
        _mm512_storeu_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// What the codes of a group stand for, twice: so a code's place may have any bit above its four.
inline __m512i numbers_of(const Weight &w, int64_t group) {
    const __m512 all = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 zero = _mm512_set1_ps(w.zeros ? w.zeros[group] : 8);
    __m512 numbers = _mm512_mul_ps(_mm512_sub_ps(all, zero), _mm512_set1_ps(w.scale[group]));
    return (__m512i)_mm512_cvtne2ps_pbh(numbers, numbers);
}

inline void widen_int4_row(const Weight &w, int64_t row, uint16_t *to) {
    // Byte p of all words holds columns 32 p .. 32 p + 31: 16 of low nibbles, 16 of high ones.
    const __m256i words = _mm256_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i lanes = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    int64_t blocks = padded(w.width) / BLOCK, each = BLOCK / w.group, group = row * blocks * each;
    const uint8_t *from = static_cast<const uint8_t *>(w.data) + row * blocks * 64;
    for (int64_t block = 0; block < blocks; block++, from += 64, to += BLOCK) {
        __m512i codes = _mm512_loadu_si512(from), numbers = _mm512_setzero_si512();
        for (int p = 0; p < 4; p++) {
            if (p * each % 4 == 0) numbers = numbers_of(w, group++);
            __m512i bytes = _mm512_permutexvar_epi8(_mm512_add_epi16(lanes, _mm512_set1_epi16(int16_t(p))), codes);
            __m512i places = _mm512_srlv_epi16(bytes, shift);
            _mm512_storeu_si512(to + 32 * p, _mm512_permutexvar_epi16(places, numbers));
        }
    }
}

// Valid until this thread asks for others.
inline Rows widened(const Weight &w, int64_t first, int64_t count) {
    if (w.kind == BFLOAT16) return {static_cast<const uint16_t *>(w.data) + first * w.width, w.width, w.width};
    thread_local Room<uint16_t> room;
    int64_t ld = padded(w.width) + 32;  // not the same lines of the nearest cache for all rows
    uint16_t *to = room.of(count * ld);
    for (int64_t r = 0; r < count; r++) {
        if (w.kind == INT4) widen_int4_row(w, first + r, to + r * ld);
        else widen_int8_row(static_cast<const int8_t *>(w.data) + (first + r) * w.width, w.width, to + r * ld);
    }
    return {to, ld, w.width};
}
#endif
