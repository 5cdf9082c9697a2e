// Tokens from logits as sampling.py's references draw them: thresholds of min-p, top-k and top-p, then the largest of
// logit / temperature + noise, the noise of each token a pure function of (seed, position, token).
#pragma once
#include <vector>

#include "cpu_math.hpp"
#include "cpu_pool.hpp"
#include "cpu_products.hpp"

struct Draw {
    const void *logits;  // [rows, ld], bfloat16 or float32
    int64_t is_half, rows, vocab, ld, threads;
    const float *temperatures, *top_p, *min_p;  // these and the next two by slot
    const int64_t *seeds, *top_k;
    const int64_t *slots, *positions;  // by row
    int64_t *last_tokens;              // by slot: 0 where a row is broken
    int64_t *tokens;                   // by row: -1 where its largest logit is no finite number
};

namespace draw {

constexpr int WIDE_LANES = 64;
constexpr int64_t PART_BLOCKS = 64, SMALL = 1 << 14;  // logits that one thread draws from alone
constexpr uint32_t SITE = 0x5A11;
constexpr int ROUNDS = 7;

// The largest of what each lane has seen, the first of several.
struct Lanes {
    float best[WIDE_LANES];
    int32_t token[WIDE_LANES];

    Lanes() {
        std::fill(best, best + WIDE_LANES, -INFINITY);
        std::fill(token, token + WIDE_LANES, -1);
    }

    void see(const float *x, int64_t first) {
        for (int i = 0; i < WIDE_LANES; i++) {
            int32_t mine = int32_t(first) + i;
            bool is_better = (x[i] > best[i]) | ((x[i] == best[i]) & (mine < token[i]));
            best[i] = is_better ? x[i] : best[i];
            token[i] = is_better ? mine : token[i];
        }
    }

    static void merge(float x, int64_t from, float &most, int64_t &which) {
        bool is_better = x > most || (x == most && from >= 0 && (which < 0 || from < which));
        if (is_better) most = x, which = from;
    }

    void result(float &most, int64_t &which) const {
        for (int i = 0; i < WIDE_LANES; i++) merge(best[i], token[i], most, which);
    }
};

struct Row {
    float highest = -INFINITY, threshold = -INFINITY;
    int64_t token = -1;
    bool is_drawn = false;
};

// 64 logits of a row; minus infinity behind the last.
inline void read(const Draw &d, int64_t row, int64_t first, float *x) {
    int64_t count = std::min<int64_t>(WIDE_LANES, d.vocab - first), place = row * d.ld + first;
    if (d.is_half) {
        const uint16_t *from = static_cast<const uint16_t *>(d.logits) + place;
        for (int64_t i = 0; i < count; i++) x[i] = widen(from[i]);
    } else {
        std::memcpy(x, static_cast<const float *>(d.logits) + place, 4 * std::max<int64_t>(count, 0));
    }
    for (int64_t i = std::max<int64_t>(count, 0); i < WIDE_LANES; i++) x[i] = -INFINITY;
}

// Gumbel noise of 64 neighbouring columns, for the four quarters of the vocabulary that they stand for.
inline void noise_of(uint32_t column, uint32_t position, uint64_t seed, float (*noise)[WIDE_LANES]) {
    uint32_t a[WIDE_LANES], b[WIDE_LANES], c[WIDE_LANES], d[WIDE_LANES];
    for (int i = 0; i < WIDE_LANES; i++) a[i] = column + i, b[i] = position, c[i] = SITE, d[i] = 0;
    uint32_t first_key = uint32_t(seed), second_key = uint32_t(seed >> 32);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < WIDE_LANES; i++) {
            uint64_t one = uint64_t(a[i]) * 0xD2511F53u, other = uint64_t(c[i]) * 0xCD9E8D57u;
            a[i] = uint32_t(other >> 32) ^ b[i] ^ first_key;
            b[i] = uint32_t(other);
            c[i] = uint32_t(one >> 32) ^ d[i] ^ second_key;
            d[i] = uint32_t(one);
        }
        first_key += 0x9E3779B9u;
        second_key += 0xBB67AE85u;
    }
    const uint32_t *words[4] = {a, b, c, d};
    for (int q = 0; q < 4; q++) {
        for (int i = 0; i < WIDE_LANES; i++) {
            float u = (float(words[q][i]) + 0.5f) * 0x1p-32f;
            u = u < 1 - 0x1p-24f ? u : 1 - 0x1p-24f;
            float small = u * (1 + u * (1.0f / 2 + u * (1.0f / 3 + u * (1.0f / 4))));
            float large = -logarithm(1 - u);
            noise[q][i] = -logarithm(u < 0x1p-6f ? small : large);
        }
    }
}

inline uint32_t key_of(float x) {  // orders as the values do
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The least value above which there is less than `target` of the weights: found by the bits of its key, from the top.
inline float last_within(const std::vector<float> &values, const std::vector<float> &weights, double target) {
    uint32_t prefix = 0;
    double above = 0;
    int left = 32;
    for (int width : {11, 11, 10}) {
        double bins[2048] = {};
        int shift = left - width;
        uint32_t mask = (1u << width) - 1;
        for (size_t i = 0; i < values.size(); i++) {
            uint32_t key = key_of(values[i]);
            if (left == 32 || key >> left == prefix) bins[key >> shift & mask] += weights[i];
        }
        uint32_t found = 0;
        double passed = above;
        for (int64_t bin = mask; bin >= 0 && passed < target; bin--) {
            if (bins[bin] == 0) continue;
            found = uint32_t(bin);
            above = passed;
            passed += bins[bin];
        }
        prefix = prefix << width | found;
        left = shift;
    }
    uint32_t bits = prefix >> 31 ? prefix & 0x7fffffffu : ~prefix;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// What min-p, top-k and top-p, each of what the ones before have left, leave of a row: its logits of at least this.
inline float threshold_of(const Draw &d, int64_t row, float highest, int64_t slot) {
    float temperature = d.temperatures[slot], top_p = d.top_p[slot], least = std::log(d.min_p[slot]);
    int64_t top_k = d.top_k[slot] > 0 && d.top_k[slot] < d.vocab ? d.top_k[slot] : 0;
    if (!top_k && top_p >= 1 && d.min_p[slot] <= 0) return -INFINITY;
    int64_t blocks = (d.vocab + WIDE_LANES - 1) / WIDE_LANES;
    thread_local std::vector<float> values, weights;
    values.resize(blocks * WIDE_LANES);
    weights.assign(values.size(), 1.0f);
    for (int64_t i = 0; i < blocks; i++) read(d, row, i * WIDE_LANES, &values[i * WIDE_LANES]);
    float limit = top_k ? last_within(values, weights, double(top_k)) : -INFINITY;
    double whole = 0;
    float lowest = highest;
    for (size_t i = 0; i < values.size(); i++) {
        float relative = (values[i] - highest) / temperature;
        bool is_kept = relative >= least && values[i] >= limit && values[i] > -INFINITY;
        weights[i] = is_kept ? exponential(relative) : 0;
        lowest = is_kept && values[i] < lowest ? values[i] : lowest;
        whole += weights[i];
    }
    return top_p >= 1 ? lowest : std::max(lowest, last_within(values, weights, double(top_p) * whole));
}

// The row's largest logit, and what may be drawn.
inline Row look(const Draw &d, int64_t row) {
    Lanes lanes;
    int odd = 0;
    float x[WIDE_LANES];
    for (int64_t first = 0; first < d.vocab; first += WIDE_LANES) {
        read(d, row, first, x);
        for (int i = 0; i < WIDE_LANES; i++) odd |= x[i] != x[i];
        lanes.see(x, first);
    }
    Row found;
    lanes.result(found.highest, found.token);
    if (odd || !std::isfinite(found.highest)) return {};
    int64_t slot = d.slots[row];
    found.is_drawn = d.temperatures[slot] > 0;
    if (found.is_drawn) found.threshold = threshold_of(d, row, found.highest, slot);
    return found;
}

inline int64_t blocks_of(const Draw &d) { return (d.vocab + 255) / 256; }

// The best score of the columns of these blocks.
inline void best_of(const Draw &d, int64_t row, float threshold, int64_t block, int64_t last, float &most,
                    int64_t &which) {
    int64_t slot = d.slots[row], strip = blocks_of(d) * WIDE_LANES;
    float temperature = d.temperatures[slot], noise[4][WIDE_LANES], x[WIDE_LANES];
    Lanes lanes;
    for (; block < last; block++) {
        noise_of(uint32_t(block * WIDE_LANES), uint32_t(d.positions[row]), uint64_t(d.seeds[slot]), noise);
        for (int q = 0; q < 4; q++) {
            int64_t first = q * strip + block * WIDE_LANES;
            read(d, row, first, x);
            for (int i = 0; i < WIDE_LANES; i++) {
                float score = x[i] / temperature + noise[q][i];
                x[i] = x[i] < threshold ? -INFINITY : score;
            }
            lanes.see(x, first);
        }
    }
    lanes.result(most, which);
}

inline void tokens_of(const Draw &d) {
    int64_t blocks = blocks_of(d), parts = (blocks + PART_BLOCKS - 1) / PART_BLOCKS;
    std::vector<Row> rows(d.rows);
    std::vector<float> most(d.rows * parts, -INFINITY);
    std::vector<int64_t> which(d.rows * parts, -1);
    Crew crew(d.rows * d.vocab <= SMALL ? 1 : int(d.threads));
    crew->phase(d.rows, [&](int64_t row) { rows[row] = look(d, row); });
    crew->phase(d.rows * parts, [&](int64_t i) {
        int64_t row = i / parts, first = i % parts * PART_BLOCKS;
        if (rows[row].is_drawn)
            best_of(d, row, rows[row].threshold, first, std::min(blocks, first + PART_BLOCKS), most[i], which[i]);
    });
    for (int64_t row = 0; row < d.rows; row++) {
        float score = -INFINITY;
        for (int64_t i = row * parts; rows[row].is_drawn && i < (row + 1) * parts; i++)
            Lanes::merge(most[i], which[i], score, rows[row].token);
        d.tokens[row] = rows[row].token;
        d.last_tokens[d.slots[row]] = std::max<int64_t>(0, rows[row].token);
    }
}

}  // namespace draw
