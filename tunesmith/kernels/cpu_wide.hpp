// Rows of products with AVX-512: what cpu_products.hpp includes.
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

// 16 vectors of 16.
inline void transpose(__m512 *v) {
    __m512 a[16];
    for (int i = 0; i < 16; i += 4) {
        __m512 low = _mm512_unpacklo_ps(v[i], v[i + 1]), high = _mm512_unpackhi_ps(v[i], v[i + 1]);
        __m512 next = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), last = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
        a[i] = _mm512_shuffle_ps(low, next, 0x44);
        a[i + 1] = _mm512_shuffle_ps(low, next, 0xee);
        a[i + 2] = _mm512_shuffle_ps(high, last, 0x44);
        a[i + 3] = _mm512_shuffle_ps(high, last, 0xee);
    }
    for (int i = 0; i < 4; i++) {  // a[4 j + i]: of rows 4 j .. 4 j + 3, tokens i, 4 + i, 8 + i, 12 + i
        __m512 even = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
        __m512 more = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
        __m512 last = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
        v[i] = _mm512_shuffle_f32x4(even, more, 0x88);
        v[4 + i] = _mm512_shuffle_f32x4(odd, last, 0x88);
        v[8 + i] = _mm512_shuffle_f32x4(even, more, 0xdd);
        v[12 + i] = _mm512_shuffle_f32x4(odd, last, 0xdd);
    }
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

// do_it(0) .. do_it(COUNT - 1), each with a constant: sums that a loop reaches by a variable are kept in memory by GCC,
// which writes them there in every step (two cycles a sum; three times the time of 16 tokens in bfloat16).
template <int... I, class Do>
inline void each_of(std::integer_sequence<int, I...>, const Do &do_it) {
    (do_it(std::integral_constant<int, I>()), ...);
}
template <int COUNT, class Do>
inline void each(const Do &do_it) {
    each_of(std::make_integer_sequence<int, COUNT>(), do_it);
}

constexpr int AHEAD = 4096;  // bytes of a weight that are asked for early

// As many lines as a step reads, of what lies so far behind it: in the order of their places, since lines row by row
// below each other come at half the rate of memory where rows are short.
template <int LINES>
inline void ask_for(const void *from) {
    constexpr int FAR = 1 << 15;
    for (int i = 0; i < LINES; i++) _mm_prefetch(static_cast<const char *>(from) + FAR + 64 * i, _MM_HINT_T1);
}

// ASKS, TURNS: of every TURNS steps, the one that asks for what comes later.
template <int T, int R, int ASKS = 0, int TURNS = 1>
void rows_float(const Weight &w, int64_t row, const Input &in, float *out) {
    const float *data = static_cast<const float *>(w.data) + row * w.width;
    __m512 sum[R * T], whole[R * T];
    each<R * T>([&](auto i) { sum[i] = _mm512_setzero_ps(); });
    for (int64_t k = 0; k < w.width; k += 16) {
        __mmask16 mask = w.width - k >= 16 ? 0xffff : (1u << (w.width - k)) - 1;
        __m512 weight[R];
        each<R>([&](auto r) { weight[r] = _mm512_maskz_loadu_ps(mask, data + r * w.width + k); });
        if (TURNS == 1 || k / 16 % TURNS == ASKS) ask_for<R>(data + R * k);
        each<T>([&](auto t) {
            __m512 x = _mm512_maskz_loadu_ps(mask, in.wide + t * in.wide_ld + k);
            each<R>([&](auto r) { sum[r * T + t] = _mm512_fmadd_ps(weight[r], x, sum[r * T + t]); });
        });
    }
    each<R * T>([&](auto i) { whole[i] = sum[i]; });
    sums_to<R * T>(whole, out);
}

inline __m512bh load_half(const uint16_t *from, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

template <int T, int R, int ASKS = 0, int TURNS = 1>
void rows_half(const Weight &w, int64_t row, const Input &in, float *out) {
    const uint16_t *data = static_cast<const uint16_t *>(w.data) + row * w.width;
    __m512 sum[R * T], whole[R * T];
    each<R * T>([&](auto i) { sum[i] = _mm512_setzero_ps(); });
    for (int64_t k = 0; k < w.width; k += 32) {
        __mmask32 mask = w.width - k >= 32 ? 0xffffffffu : (1u << (w.width - k)) - 1;
        __m512bh weight[R];
        each<R>([&](auto r) { weight[r] = load_half(data + r * w.width + k, mask); });
        if (TURNS == 1 || k / 32 % TURNS == ASKS) ask_for<R>(data + R * k);
        each<T>([&](auto t) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(in.half + t * in.ld + k);
            each<R>([&](auto r) { sum[r * T + t] = _mm512_dpbf16_ps(sum[r * T + t], weight[r], x); });
        });
    }
    each<R * T>([&](auto i) { whole[i] = sum[i]; });
    sums_to<R * T>(whole, out);
}

template <int T, int R>
void rows_int8(const Weight &w, int64_t row, const Input &in, float *out) {
    constexpr int64_t MOST_WIDTH = 8192;  // of which no sum of products can leave 32 bits
    __m512 sum[R * T];
    for (int r = 0; r < R; r++) {
        const int8_t *data = static_cast<const int8_t *>(w.data) + (row + r) * w.width;
        __m512 *own = sum + r * T;
        for (int t = 0; t < T; t++) own[t] = _mm512_setzero_ps();
        for (int64_t start = 0; start < w.width; start += MOST_WIDTH) {
            int64_t end = std::min(w.width, start + MOST_WIDTH), k = start;
            __m512i whole[T][2];
            for (auto &both : whole) both[0] = both[1] = _mm512_setzero_si512();
            auto add = [&](__m256i bytes, int64_t place, int which) {
                __m512i codes = _mm512_cvtepi8_epi16(bytes);
                for (int t = 0; t < T; t++) {
                    __m512i x = _mm512_loadu_si512(in.codes + t * in.ld + place);
                    whole[t][which] = _mm512_dpwssd_epi32(whole[t][which], codes, x);
                }
            };
            for (; k + 64 <= end; k += 64) {
                _mm_prefetch((const char *)(data + k + AHEAD), _MM_HINT_T0);
                add(_mm256_loadu_si256((const __m256i *)(data + k)), k, 0);
                add(_mm256_loadu_si256((const __m256i *)(data + k + 32)), k + 32, 1);
            }
            for (; k < end; k += 32) {
                __mmask32 mask = end - k >= 32 ? 0xffffffffu : (1u << (end - k)) - 1;
                add(_mm256_maskz_loadu_epi8(mask, data + k), k, 0);
            }
            for (int t = 0; t < T; t++) {
                __m512i both = _mm512_add_epi32(whole[t][0], whole[t][1]);
                own[t] = _mm512_add_ps(own[t], _mm512_cvtepi32_ps(both));
            }
        }
        for (int t = 0; t < T; t++) own[t] = _mm512_mul_ps(own[t], _mm512_set1_ps(w.scale[row + r] * in.steps[t]));
    }
    sums_to<R * T>(sum, out);
}

// A block of codes 0 .. 15 as 128 bytes. Of one group, in the order that costs least:
//     byte 4 i + b of half h      column 32 b + 16 h + i      i = 0 .. 15
// Of several groups, in the columns' own.
template <int GROUPS>
inline void unpack(__m512i words, __m512i &first, __m512i &second) {
    const __m512i nibble = _mm512_set1_epi8(15);
    if (GROUPS == 1) {
        first = _mm512_and_si512(words, nibble);
        second = _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble);
        return;
    }
    // Byte b of all words holds columns 32 b .. 32 b + 31: 16 of low nibbles, 16 of high ones.
    const __m512i shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    const __m512i lanes = _mm512_set_epi32(
        0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400, 0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400, 0x3c383430,
        0x2c282420, 0x1c181410, 0x0c080400, 0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);
    const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);
    const __m512i from = _mm512_mask_add_epi8(lanes, 0xffffffff00000000u, lanes, one);
    first = _mm512_and_si512(_mm512_srlv_epi64(_mm512_permutexvar_epi8(from, words), shift), nibble);
    __m512i next = _mm512_permutexvar_epi8(_mm512_add_epi8(from, two), words);
    second = _mm512_and_si512(_mm512_srlv_epi64(next, shift), nibble);
}

// The bytes of a block of x in the order of `unpack`, and its codes by planes of 16 columns. Where x holds what is no
// number the inverse is 0 and the bytes are 0.
inline void split(
    const float *x, int64_t count, float inverse, bool one_group, __m512i *q, uint8_t *high, uint8_t *low) {
    const __m512i byte = _mm512_set1_epi32(255);
    for (int j = 0; j < 8; j++) {
        int64_t left = std::max<int64_t>(0, count - 16 * j);
        __mmask16 mask = inverse == 0 ? 0 : left >= 16 ? 0xffff : (1u << left) - 1;
        __m512 part = _mm512_maskz_loadu_ps(mask, x + 16 * j);
        q[j] = _mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(inverse)));
        if (one_group) continue;
        _mm_storeu_si128((__m128i *)(high + 16 * j), _mm512_cvtepi32_epi8(_mm512_srai_epi32(q[j], 8)));
        _mm_storeu_si128((__m128i *)(low + 16 * j), _mm512_cvtepi32_epi8(q[j]));
    }
    for (int half = 0; half < 2 && one_group; half++) {
        __m512i highs = _mm512_setzero_si512(), lows = highs;
        for (int b = 3; b >= 0; b--) {
            __m512i plane = q[2 * b + half], top = _mm512_and_si512(_mm512_srli_epi32(plane, 8), byte);
            highs = _mm512_or_si512(_mm512_slli_epi32(highs, 8), top);
            lows = _mm512_or_si512(_mm512_slli_epi32(lows, 8), _mm512_and_si512(plane, byte));
        }
        _mm512_storeu_si512(high + 64 * half, highs);
        _mm512_storeu_si512(low + 64 * half, lows);
    }
}

// put(what the codes of so many planes add up to), for each group of a block.
template <class Put>
inline void sum_groups(const __m512i *q, int planes, const Put &put) {
    for (int j = 0; j < 8; j += planes) {
        __m512i sum = q[j];
        for (int i = 1; i < planes; i++) sum = _mm512_add_epi32(sum, q[j + i]);
        put(float(_mm512_reduce_add_epi32(sum)));
    }
}

// A row of x for int4: of each block 128 high bytes, then 128 low ones. sums: of the codes of each group.
inline void prepare_int4(const Weight &w, const float *x, float inverse, int16_t *codes, float *sums) {
    uint8_t *bytes = reinterpret_cast<uint8_t *>(codes);
    for (int64_t k = 0; k < w.width; k += BLOCK, bytes += 2 * BLOCK) {
        __m512i q[8];
        split(x + k, w.width - k, inverse, w.group == BLOCK, q, bytes, bytes + BLOCK);
        sum_groups(q, int(w.group / 16), [&](float sum) { *sums++ = sum; });
    }
}

// What the zero points take away: the sum of scale * zero * sums over the groups, in 16 lanes.
inline __m512 taken_by_zeros(const Weight &w, int64_t row, const float *sums) {
    int64_t groups = padded(w.width) / w.group;
    __m512 total = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += 16) {
        __mmask16 mask = groups - g >= 16 ? 0xffff : (1u << (groups - g)) - 1;
        __m512 part = _mm512_mul_ps(
            _mm512_maskz_loadu_ps(mask, w.scale + row * groups + g), _mm512_maskz_loadu_ps(mask, sums + g));
        __m512 zero = _mm512_set1_ps(8);
        if (w.zeros) {
            __m128i bytes = _mm_maskz_loadu_epi8(mask, w.zeros + row * groups + g);
            zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        }
        total = _mm512_fmadd_ps(part, zero, total);
    }
    return total;
}

// GROUPS: of a block.
template <int T, int R, int GROUPS>
void rows_int4(const Weight &w, int64_t row, const Input &in, float *out) {
    int64_t blocks = padded(w.width) / BLOCK;
    __m512 sum[R * T];
    for (int r = 0; r < R; r++) {
        const uint8_t *words = static_cast<const uint8_t *>(w.data) + (row + r) * blocks * 64;
        const float *scale = w.scale + (row + r) * blocks * GROUPS;
        __m512 own[T];
        for (int t = 0; t < T; t++)
            own[t] = _mm512_sub_ps(_mm512_setzero_ps(), taken_by_zeros(w, row + r, in.sums + t * (in.ld / FINEST)));
        for (int64_t block = 0; block < blocks; block++, words += 64, scale += GROUPS) {
            _mm_prefetch((const char *)(words + AHEAD), _MM_HINT_T0);
            __m512i first, second;
            unpack<GROUPS>(_mm512_loadu_si512(words), first, second);
            __m512 step[2];
            for (int half = 0; half < 2; half++) {
                step[half] = _mm512_set1_ps(scale[half * GROUPS / 2]);
                if (GROUPS != 4) continue;
                step[half] = _mm512_mask_mov_ps(step[half], 0xff00, _mm512_set1_ps(scale[2 * half + 1]));
            }
            for (int t = 0; t < T; t++) {
                const uint8_t *x = reinterpret_cast<const uint8_t *>(in.codes + t * in.ld + block * BLOCK);
                auto times = [&](__m512i whole, int place, __m512i codes, bool low) {
                    __m512i bytes = _mm512_loadu_si512(x + place);
                    return low ? _mm512_dpbusd_epi32(whole, bytes, codes) : _mm512_dpbusd_epi32(whole, codes, bytes);
                };
                const __m512i none = _mm512_setzero_si512();
                __m512i one = times(none, 0, first, false);
                if (GROUPS == 1) {
                    one = _mm512_slli_epi32(times(one, 64, second, false), 8);
                    one = times(times(one, 128, first, true), 192, second, true);
                } else {
                    one = times(_mm512_slli_epi32(one, 8), 128, first, true);
                    __m512i other = _mm512_slli_epi32(times(none, 64, second, false), 8);
                    other = times(other, 192, second, true);
                    own[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(other), step[1], own[t]);
                }
                own[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), step[0], own[t]);
            }
        }
        for (int t = 0; t < T; t++) sum[r * T + t] = _mm512_mul_ps(own[t], _mm512_set1_ps(in.steps[t]));
    }
    sums_to<R * T>(sum, out);
}
