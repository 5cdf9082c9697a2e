// Rows of products of several tokens by the matrix unit: what cpu_products.hpp includes.
//
//     a tile of the weight, 16 rows of 64 bytes as it lies, x a tile of x [16, MOST, 4 bytes]: 16 rows of MOST sums
//
// A panel is what is summed at a time: rows that lie behind each other, so the next one is asked for line by line.
#pragma once

struct alignas(64) TileShape {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

constexpr int TILE_BYTES = 1024, PAIR = 2 * TILE_BYTES;  // a tile of high bytes of x, and one of low ones

// Columns first .. last, of whole blocks, of one token; `step_of` the row gave the inverse.
inline void prepare_tiles(
    const Weight &w, const float *x, float inverse, const Input &in, int token, int64_t first, int64_t last) {
    last = std::min(last, w.width);
    if (w.kind == BFLOAT16) return prepare_lanes(x, in, token, first, last);
    for (int64_t k = first; k < last; k += BLOCK) {
        alignas(64) uint8_t bytes[2][BLOCK];
        __m512i q[8];
        split(x + k, w.width - k, inverse, w.kind == INT4 && w.group == BLOCK, q, bytes[0], bytes[1]);
        uint8_t *tile = reinterpret_cast<uint8_t *>(in.codes + k * MOST);
        for (int i = 0; i < 4 && (w.kind == INT4 || k + i / 2 * 64 < w.width); i++)
            scatter(bytes[i % 2] + i / 2 * 64, 16, token, tile + i * TILE_BYTES);
        if (w.kind != INT4) continue;
        float *sums = in.sums + k / w.group * MOST + token;
        sum_groups(q, int(w.group / 16), [&](float sum) { *sums = sum, sums += MOST; });
    }
}

inline void ask_for(const uint8_t *from, int lines) {
    for (int i = 0; i < lines; i++) _mm_prefetch((const char *)(from + 64 * i), _MM_HINT_T1);
}

// Each panel: sums [16 * COUNT] of the rows that begin at `data`.
template <int COUNT>
inline void panel_half(const Weight &w, int64_t row, const Input &in, __m512 *sums) {
    const uint8_t *data = static_cast<const uint8_t *>(w.data) + row * 2 * w.width;
    int64_t stride = 2 * w.width;
    const uint8_t *next = data + 16 * COUNT * stride;
    _tile_zero(0);
    if (COUNT > 1) _tile_zero(1);
    if (COUNT > 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < w.width; k += 32, next += 1024 * COUNT) {
        const uint8_t *from = data + 2 * k;
        ask_for(next, 16 * COUNT);
        _tile_loadd(4, in.tiles + k * MOST, 64);
        _tile_loadd(5, from, stride);
        _tile_dpbf16ps(0, 5, 4);
        if (COUNT > 1) {
            _tile_loadd(6, from + 16 * stride, stride);
            _tile_dpbf16ps(1, 6, 4);
        }
        if (COUNT > 2) {
            _tile_loadd(7, from + 32 * stride, stride);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, from + 48 * stride, stride);
            _tile_dpbf16ps(3, 5, 4);
        }
    }
    _tile_stored(0, sums, 64);
    if (COUNT > 1) _tile_stored(1, sums + 16, 64);
    if (COUNT > 2) {
        _tile_stored(2, sums + 32, 64);
        _tile_stored(3, sums + 48, 64);
    }
}

template <int COUNT>
inline void panel_int8(const Weight &w, int64_t row, const Input &in, __m512 *sums) {
    const uint8_t *data = static_cast<const uint8_t *>(w.data) + row * w.width;
    const uint8_t *next = data + 16 * COUNT * w.width, *x = reinterpret_cast<const uint8_t *>(in.codes);
    _tile_zero(0);
    _tile_zero(1);
    if (COUNT > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < w.width; k += 64, next += 1024 * COUNT, x += PAIR) {
        ask_for(next, 16 * COUNT);
        _tile_loadd(6, x, 64);
        _tile_loadd(4, data + k, w.width);
        _tile_loadd(7, x + TILE_BYTES, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (COUNT > 1) {
            _tile_loadd(5, data + 16 * w.width + k, w.width);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    alignas(64) __m512i whole[4][16];
    _tile_stored(0, whole[0], 64);
    _tile_stored(1, whole[1], 64);
    if (COUNT > 1) {
        _tile_stored(2, whole[2], 64);
        _tile_stored(3, whole[3], 64);
    }
    __m512 steps = _mm512_loadu_ps(in.steps);
    for (int r = 0; r < 16 * COUNT; r++) {
        const auto *both = whole + r / 16 * 2;
        __m512 high = _mm512_cvtepi32_ps(both[0][r % 16]), low = _mm512_cvtepi32_ps(both[1][r % 16]);
        __m512 scale = _mm512_mul_ps(steps, _mm512_set1_ps(w.scale[row + r]));
        sums[r] = _mm512_mul_ps(_mm512_fmadd_ps(high, _mm512_set1_ps(256), low), scale);
    }
}

// The codes of a block of 16 rows, as two tiles.
template <int GROUPS>
inline void unpack_rows(const uint8_t *words, int64_t row_bytes, __m512i *codes) {
    for (int r = 0; r < 16; r++, words += row_bytes) unpack<GROUPS>(_mm512_loadu_si512(words), codes[r], codes[16 + r]);
}

// Of 16 groups: each row's scale, and that times its zero point.
struct Scales {
    alignas(64) float scale[32][16], zero[32][16];

    void read(const Weight &w, int64_t row, int rows, int64_t group, int64_t groups) {
        __mmask16 mask = groups - group >= 16 ? 0xffff : (1u << (groups - group)) - 1;
        for (int r = 0; r < rows; r++) {
            int64_t place = (row + r) * groups + group;
            __m512 own = _mm512_maskz_loadu_ps(mask, w.scale + place), point = _mm512_set1_ps(8);
            if (w.zeros) {
                __m128i bytes = _mm_maskz_loadu_epi8(mask, w.zeros + place);
                point = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
            }
            _mm512_store_ps(scale[r], own);
            _mm512_store_ps(zero[r], _mm512_mul_ps(own, point));
        }
    }
};

// GROUPS: of a block. While the unit multiplies a block the next one is unpacked, and the sums of the group before it
// are scaled.
template <int GROUPS, int COUNT>
inline void panel_int4(const Weight &w, int64_t row, const Input &in, __m512 *sums) {
    int64_t blocks = padded(w.width) / BLOCK, row_bytes = 64 * blocks;
    const uint8_t *words = static_cast<const uint8_t *>(w.data) + row * row_bytes;
    const uint8_t *next = words + 16 * COUNT * row_bytes, *x = reinterpret_cast<const uint8_t *>(in.codes);
    alignas(64) __m512i codes[2][COUNT][32], whole[2][2 * COUNT][16];
    Scales scales;
    for (int r = 0; r < 16 * COUNT; r++) sums[r] = _mm512_setzero_ps();
    auto unpack_next = [&](int64_t block) {
        for (int i = 0; i < COUNT; i++)
            unpack_rows<GROUPS>(words + 16 * i * row_bytes + 64 * block, row_bytes, codes[block % 2][i]);
    };
    auto take = [&](int64_t group) {
        if (group % 16 == 0) scales.read(w, row, 16 * COUNT, group, blocks * GROUPS);
        const auto &from = whole[group % 2];
        __m512 own = _mm512_loadu_ps(in.sums + group * MOST);
        const float *scale = scales.scale[0] + group % 16, *zero = scales.zero[0] + group % 16;
#pragma GCC unroll 32
        for (int r = 0; r < 16 * COUNT; r++) {
            __m512i high = _mm512_slli_epi32(from[r / 16 * 2][r % 16], 8);
            __m512 both = _mm512_cvtepi32_ps(_mm512_add_epi32(high, from[r / 16 * 2 + 1][r % 16]));
            __m512 sum = _mm512_fmadd_ps(both, _mm512_set1_ps(scale[16 * r]), sums[r]);
            sums[r] = _mm512_fnmadd_ps(own, _mm512_set1_ps(zero[16 * r]), sum);
        }
    };
    unpack_next(0);
    for (int64_t block = 0; block < blocks; block++, next += 1024 * COUNT, x += 2 * PAIR) {
        ask_for(next, 16 * COUNT);
        if (block + 1 < blocks) unpack_next(block + 1);
        asm volatile("" ::: "memory");  // older compilers do not know that a tile is loaded from memory
        const __m512i *own = codes[block % 2][0];
        for (int g = 0; g < GROUPS; g++) {
            int64_t group = block * GROUPS + g;
            auto &to = whole[group % 2];
            _tile_zero(0);
            _tile_zero(1);
            if (COUNT > 1) {
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int half = g * 2 / GROUPS; half < (g + 1) * 2 / GROUPS || half == g * 2 / GROUPS; half++) {
                int part = GROUPS == 4 ? g % 2 : 0;
                const uint8_t *from = x + half * PAIR + part * TILE_BYTES / 2;
                const uint8_t *tile = reinterpret_cast<const uint8_t *>(own + 16 * half) + 32 * part;
                _tile_loadd(6, from, 64);
                _tile_loadd(4, tile, 64);
                _tile_loadd(7, from + TILE_BYTES, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbsud(1, 4, 7);
                if (COUNT > 1) {
                    _tile_loadd(5, tile + PAIR, 64);
                    _tile_dpbssd(2, 5, 6);
                    _tile_dpbsud(3, 5, 7);
                }
            }
            _tile_stored(0, to[0], 64);
            _tile_stored(1, to[1], 64);
            if (COUNT > 1) {
                _tile_stored(2, to[2], 64);
                _tile_stored(3, to[3], 64);
            }
            if (group > 0) take(group - 1);
        }
    }
    take(blocks * GROUPS - 1);
    __m512 steps = _mm512_loadu_ps(in.steps);
    for (int r = 0; r < 16 * COUNT; r++) sums[r] = _mm512_mul_ps(sums[r], steps);
}

template <int COUNT>
inline void panel(const Weight &w, int64_t row, const Input &in, __m512 *sums) {
    constexpr int SOME = COUNT > 1 ? 2 : 1;
    if (w.kind == BFLOAT16) panel_half<COUNT>(w, row, in, sums);
    else if (w.kind == INT8) panel_int8<SOME>(w, row, in, sums);
    else if (w.group == 128) panel_int4<1, SOME>(w, row, in, sums);
    else if (w.group == 64) panel_int4<2, SOME>(w, row, in, sums);
    else panel_int4<4, SOME>(w, row, in, sums);
}

inline void by_tiles(const Weight &w, const Input &in, int tokens, int64_t row, int64_t last, const Output &out) {
    TileShape shape;
    bool narrower = w.kind == INT4 && w.group == 32;  // a group is half a tile
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    for (int i = 4; i < 6 && narrower; i++) shape.bytes[i] = 32;
    for (int i = 6; i < 8 && narrower; i++) shape.rows[i] = 8;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shape);
    alignas(64) __m512 sums[64];
    int count = w.kind == BFLOAT16 ? 4 : 2;
    for (; row + 16 * count <= last; row += 16 * count) {
        if (count == 4) panel<4>(w, row, in, sums);
        else panel<2>(w, row, in, sums);
        for (int i = 0; i < count; i++) {
            int64_t from = row + 16 * i;
            put_tile(w, from, from, from + 16, tokens, sums + 16 * i, out);
        }
    }
    for (; row < last; row += 16) {  // of the last ones, some may be there already
        int64_t from = std::max<int64_t>(0, std::min(row, last - 16));
        panel<1>(w, from, in, sums);
        put_tile(w, from, row, std::min(last, row + 16), tokens, sums, out);
    }
    _tile_release();
}
