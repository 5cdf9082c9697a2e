// A matrix unit in plain C++, so that what goes through one is also tested where there is none. To be included before
// all else (-include) with __AMX_TILE__, __AMX_BF16__ and __AMX_INT8__ defined, on a processor that has the rest. What
// the unit would refuse ends the process.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
    uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local int rows[8], widths[8];
inline thread_local bool is_configured = false;

inline void need(bool fits, const char *what) {
    if (fits) return;
    std::fprintf(stderr, "no such %s of tiles\n", what);
    std::abort();
}

inline void configure(const void *from) {
    const uint8_t *shape = static_cast<const uint8_t *>(from);
    need(shape[0] == 1, "palette");
    for (int i = 0; i < 8; i++) {
        widths[i] = shape[16 + 2 * i] + 256 * shape[17 + 2 * i];
        rows[i] = shape[48 + i];
        need(widths[i] <= 64 && rows[i] <= 16, "shape");
    }
    std::memset(tiles, 0, sizeof tiles);
    is_configured = true;
}

inline void release() { is_configured = false; }

inline void clear(int i) {
    need(is_configured, "clearing");
    std::memset(&tiles[i], 0, sizeof(Tile));
}

inline void load(int i, const void *from, int64_t stride) {
    clear(i);
    for (int r = 0; r < rows[i]; r++)
        std::memcpy(tiles[i].bytes[r], static_cast<const char *>(from) + r * stride, widths[i]);
}

inline void store(int i, void *to, int64_t stride) {
    need(is_configured, "storing");
    for (int r = 0; r < rows[i]; r++) std::memcpy(static_cast<char *>(to) + r * stride, tiles[i].bytes[r], widths[i]);
}

inline float wide(const uint8_t *half) {
    uint32_t bits = uint32_t(half[0]) << 16 | uint32_t(half[1]) << 24;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Of pairs of bfloat16 the first ones and the second ones are summed apart, as the unit does it.
struct Halves {
    float sums[2] = {};

    void add(const uint8_t *x, const uint8_t *y) {
        for (int i = 0; i < 2; i++) sums[i] = std::fma(wide(x + 2 * i), wide(y + 2 * i), sums[i]);
    }
    float to(float sum) const { return sum + (sums[0] + sums[1]); }
};

template <class Right>
struct Bytes {
    int64_t sum = 0;

    void add(const uint8_t *x, const uint8_t *y) {
        for (int i = 0; i < 4; i++) sum += int(int8_t(x[i])) * int(Right(y[i]));
    }
    int32_t to(int32_t before) const {
        need(before + sum == int32_t(before + sum), "sum");
        return int32_t(before + sum);
    }
};

// sums[m, n] += the products of four bytes of a[m, k] and four bytes of b[k, n] over k.
template <class Number, class Sum>
void multiply(int sums, int a, int b) {
    need(is_configured && rows[sums] == rows[a] && widths[sums] == widths[b] && widths[a] == 4 * rows[b], "product");
    for (int m = 0; m < rows[sums]; m++) {
        for (int n = 0; n < widths[sums] / 4; n++) {
            Sum found;
            for (int k = 0; k < rows[b]; k++) found.add(tiles[a].bytes[m] + 4 * k, tiles[b].bytes[k] + 4 * n);
            Number number;
            std::memcpy(&number, tiles[sums].bytes[m] + 4 * n, 4);
            number = found.to(number);
            std::memcpy(tiles[sums].bytes[m] + 4 * n, &number, 4);
        }
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig(from) emulated::configure(from)
#define _tile_release() emulated::release()
#define _tile_zero(i) emulated::clear(i)
#define _tile_loadd(i, from, stride) emulated::load(i, from, stride)
#define _tile_stored(i, to, stride) emulated::store(i, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply<float, emulated::Halves>(sums, a, b)
#define _tile_dpbssd(sums, a, b) emulated::multiply<int32_t, emulated::Bytes<int8_t>>(sums, a, b)
#define _tile_dpbsud(sums, a, b) emulated::multiply<int32_t, emulated::Bytes<uint8_t>>(sums, a, b)
#define syscall(...) 0L
