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

constexpr int64_t PART_BLOCKS = 256, SMALL = 1 << 15;  // logits that one thread draws from alone
constexpr uint32_t SITE = 0x5A11;
constexpr int ROUNDS = 7;

inline Whole counted(int64_t first) {
    Whole numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return numbers + int32_t(first);
}

inline void merge(float x, int64_t token, float &most, int64_t &which) {
    bool is_better = x > most || (x == most && token >= 0 && (which < 0 || token < which));
    if (is_better) most = x, which = token;
}

// The largest of what each lane has seen, the first of several.
struct Lanes {
    Vector best = Vector{} - INFINITY;
    Whole token = Whole{} - 1;

    void see(Vector x, int64_t first) {
        Whole mine = counted(first), is_better = (x > best) | ((x == best) & (mine < token));
        best = is_better ? x : best;
        token = is_better ? mine : token;
    }

    void result(float &most, int64_t &which) const {
        for (int i = 0; i < LANES; i++) merge(best[i], token[i], most, which);
    }
};

struct Row {
    float highest = -INFINITY, threshold = -INFINITY;
    int64_t token = -1;
    bool is_drawn = false;
};

// 16 logits of a row; minus infinity behind the last.
inline Vector read(const Draw &d, int64_t row, int64_t first) {
    int64_t count = d.vocab - first, place = row * d.ld + first;
    auto floats = [&](const uint16_t *from) {
        return (Vector)(__builtin_convertvector(*(const Halves *)from, Words) << 16);
    };
    const uint16_t *halves = static_cast<const uint16_t *>(d.logits) + place;
    const float *wide = static_cast<const float *>(d.logits) + place;
    if (count >= LANES) return d.is_half ? floats(halves) : *(const Vector *)wide;
    Vector x = Vector{} - INFINITY;
    for (int64_t i = 0; i < count; i++) x[i] = d.is_half ? widen(halves[i]) : wide[i];
    return x;
}

inline Vector uniform(Words word) {
    Vector u = (__builtin_convertvector(word, Vector) + 0.5f) * 0x1p-32f, most = Vector{} + (1 - 0x1p-24f);
    return u < most ? u : most;
}

inline Vector gumbel(Vector u) {
    Vector small = u * (1.0f + u * (1.0f / 2 + u * (1.0f / 3 + u * (1.0f / 4))));
    return -logarithm(u < 0x1p-6f ? small : -logarithm(1.0f - u));
}

// At least the noise of u, by its exponent: -ln(-ln(1 - u)) <= -ln u.
inline Vector bound_of(Vector u) { return __builtin_convertvector(127 - ((Whole)u >> 23), Vector) * 0.69314724f; }

// What noise is made of, of 16 neighbouring columns, for the four quarters of the vocabulary that they stand for.
inline void uniforms_of(int64_t column, uint32_t position, uint64_t seed, Vector *found) {
    Words a = (Words)counted(column), b = Words{} + position, c = Words{} + SITE, d = {};
    uint32_t first_key = uint32_t(seed), second_key = uint32_t(seed >> 32);
    for (int round = 0; round < ROUNDS; round++) {
        Words high, low, other_high, other_low;
        multiply_wide(a, 0xD2511F53u, high, low);
        multiply_wide(c, 0xCD9E8D57u, other_high, other_low);
        a = other_high ^ b ^ first_key;
        b = other_low;
        c = high ^ d ^ second_key;
        d = low;
        first_key += 0x9E3779B9u;
        second_key += 0xBB67AE85u;
    }
    found[0] = uniform(a);
    found[1] = uniform(b);
    found[2] = uniform(c);
    found[3] = uniform(d);
}

inline uint32_t key_of(float x) {  // orders as the values do
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Weighted {
    uint32_t key;
    float weight;
};

// The least value above which there is less than `target` of the weights: found by the bits of its key, from the top.
// What can't be it any more is dropped from the list.
inline float last_within(std::vector<Weighted> &list, double target) {
    uint32_t prefix = 0;
    double above = 0;
    int left = 32;
    for (int width : {11, 11, 10}) {
        double bins[2048] = {};
        int shift = left - width;
        uint32_t mask = (1u << width) - 1, found = 0;
        for (const Weighted &one : list) bins[one.key >> shift & mask] += one.weight;
        double passed = above;
        for (int64_t bin = mask; bin >= 0 && passed < target; bin--) {
            if (bins[bin] == 0) continue;
            found = uint32_t(bin);
            above = passed;
            passed += bins[bin];
        }
        auto is_other = [&](const Weighted &one) { return (one.key >> shift & mask) != found; };
        list.erase(std::remove_if(list.begin(), list.end(), is_other), list.end());
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
    thread_local std::vector<Weighted> list;
    auto gather = [&](Vector limit) {  // what is at least this, and its mass beside the largest one's
        double whole = 0;
        list.clear();
        for (int64_t first = 0; first < d.vocab; first += LANES) {
            Vector x = read(d, row, first), relative = (x - highest) / temperature;
            Whole is_kept = (relative >= least) & (x >= limit) & (x > -INFINITY);
            if (!any(is_kept)) continue;
            Vector weight = top_p < 1 ? exponential(relative) : Vector{} + 1.0f;
            for (int i = 0; i < LANES; i++) {
                if (!is_kept[i]) continue;
                list.push_back({key_of(x[i]), weight[i]});
                whole += weight[i];
            }
        }
        return whole;
    };
    float limit = -INFINITY;
    if (top_k) {
        list.clear();
        for (int64_t first = 0; first < d.vocab; first += LANES) {
            Vector x = read(d, row, first);
            for (int i = 0; i < LANES && first + i < d.vocab; i++) list.push_back({key_of(x[i]), 1.0f});
        }
        limit = last_within(list, double(top_k));
    }
    double whole = gather(Vector{} + limit);
    // Also of a top-p that float32 rounds to zero the largest logits stay.
    return last_within(list, top_p < 1 ? std::max(double(top_p) * whole, 1e-300) : INFINITY);
}

// The row's largest logit, and what may be drawn.
inline Row look(const Draw &d, int64_t row) {
    Lanes lanes;
    Whole odd = {};
    for (int64_t first = 0; first < d.vocab; first += LANES) {
        Vector x = read(d, row, first);
        odd |= x != x;
        lanes.see(x, first);
    }
    Row found;
    lanes.result(found.highest, found.token);
    for (int i = 0; i < LANES; i++)
        if (odd[i]) return {};
    if (!std::isfinite(found.highest)) return {};
    int64_t slot = d.slots[row];
    found.is_drawn = d.temperatures[slot] > 0;
    if (found.is_drawn) found.threshold = threshold_of(d, row, found.highest, slot);
    return found;
}

inline int64_t strip_of(const Draw &d) { return (d.vocab + 255) / 256 * 64; }  // a quarter of the vocabulary

// The best score of the columns of these blocks.
inline void best_of(const Draw &d, int64_t row, float threshold, int64_t block, int64_t last, float &most,
                    int64_t &which) {
    int64_t slot = d.slots[row], strip = strip_of(d);
    float temperature = d.temperatures[slot], inverse = 1.0f / temperature;
    Lanes lanes;
    for (; block < last; block++) {
        Vector u[4];
        uniforms_of(block * LANES, uint32_t(d.positions[row]), uint64_t(d.seeds[slot]), u);
        for (int q = 0; q < 4; q++) {
            int64_t first = q * strip + block * LANES;
            Vector x = read(d, row, first), scaled = x * inverse;
            Vector slack = (scaled < 0 ? -scaled : scaled) * 1e-6f + 1e-3f;
            // Most can't win whatever their noise is, and get none.
            if (!any((scaled + bound_of(u[q]) + slack >= lanes.best) & (x >= threshold))) continue;
            lanes.see(x < threshold ? Vector{} - INFINITY : x / temperature + gumbel(u[q]), first);
        }
    }
    lanes.result(most, which);
}

inline void tokens_of(const Draw &d) {
    int64_t blocks = strip_of(d) / LANES, parts = (blocks + PART_BLOCKS - 1) / PART_BLOCKS;
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
            merge(most[i], which[i], score, rows[row].token);
        d.tokens[row] = rows[row].token;
        d.last_tokens[d.slots[row]] = std::max<int64_t>(0, rows[row].token);
    }
}

}  // namespace draw
