// Attention of several new tokens of a request over its pages: the scores of 16 queries lie side by side, so that the
// softmax goes by lanes, and the values are the right factor's rows once they are turned around.
#pragma once
#include "cpu_math.hpp"
#include "cpu_panels.hpp"

#if WIDE

// Queries of one request: groups first .. last of the step's tokens. before: tokens of context ahead of `start`.
struct Queries {
    int64_t first, last, start, end, before;
    const int32_t *table;
};

// One key head of one layer. queries, mixed: [groups, heads * head_dim / 2, 16 tokens, 2].
class PromptAttention {
   public:
    PromptAttention(const Model &m, const Layer &layer, const uint16_t *queries, uint16_t *mixed)
        : m(m), layer(layer), queries(queries), mixed(mixed), stride(m.heads * m.head_dim * GROUP) {}

    void operator()(const Queries &q, int64_t kv) {
        thread_local Rooms rooms;
        int64_t H = m.head_dim, group = m.heads / m.kv_heads;
        int64_t from = std::max(q.start, q.first * GROUP), to = std::min(q.end, q.last * GROUP);
        int64_t newest = q.before + to - 1 - q.start, oldest = q.before + from - q.start;
        int64_t begin = layer.window ? std::max<int64_t>(0, oldest - layer.window + 1) : 0;
        int64_t count = newest + 1 - begin, places = (count + 31) / 32 * 32, turned_ld = places + 32;
        uint16_t *keys = rooms.keys.of(places * H), *values = rooms.values.of(turned_ld * H);
        float *scores = rooms.scores.of(MOST_GROUPS * places * GROUP), *out = rooms.out.of(MOST_GROUPS * H * GROUP);
        uint16_t *shares = rooms.shares.of(MOST_GROUPS * places * GROUP);
        gather(q.table, begin, count, places, kv, keys, values, turned_ld);
        int64_t most = std::min(groups_at_a_time(H), groups_at_a_time(places));
        for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
            for (int64_t g = q.first; g < q.last; g += most) {
                int64_t some = std::min(most, q.last - g);
                const uint16_t *x = queries + g * stride + head * H * GROUP;
                sums_of_groups(places, keys, H, H, x, stride, some, scores, places * GROUP);
                __m512 inverse[MOST_GROUPS];
                for (int64_t i = 0; i < some; i++) {
                    int64_t place = i * places * GROUP;
                    inverse[i] = soften(q, g + i, begin, places, scores + place, shares + place);
                }
                sums_of_groups(H, values, turned_ld, places, shares, places * GROUP, some, out, H * GROUP);
                for (int64_t i = 0; i < some; i++)
                    put(q, g + i, out + i * H * GROUP, inverse[i], mixed + (g + i) * stride + head * H * GROUP);
            }
        }
    }

   private:
    struct Rooms {
        Room<uint16_t> keys, values, shares;
        Room<float> scores, out;
    };

    // Keys as rows, values as columns; zero behind the last.
    void gather(const int32_t *table, int64_t begin, int64_t count, int64_t places, int64_t kv, uint16_t *keys,
                uint16_t *values, int64_t turned_ld) const {
        int64_t H = m.head_dim, row = m.kv_heads * H;
        for (int64_t j = 0; j < places; j++) {
            int64_t p = begin + j, place = 0;
            if (j < count) place = (table[p / m.page_slots] * m.page_slots + p % m.page_slots) * row + kv * H;
            const uint16_t *key = static_cast<const uint16_t *>(layer.keys) + place;
            const uint16_t *value = static_cast<const uint16_t *>(layer.values) + place;
            if (j < count) std::memcpy(keys + j * H, key, 2 * H);
            else std::memset(keys + j * H, 0, 2 * H);
            for (int64_t i = 0; i < H; i++) values[i * turned_ld + j] = j < count ? value[i] : 0;
        }
    }

    // Which tokens of a group are the request's.
    static __mmask16 own(const Queries &q, int64_t g) {
        int64_t from = std::max<int64_t>(0, q.start - g * GROUP), to = std::min<int64_t>(GROUP, q.end - g * GROUP);
        return __mmask16(((1u << to) - 1) & ~((1u << from) - 1));
    }

    // Scores become shares, not yet divided by their sum, whose inverse is returned.
    __m512 soften(
        const Queries &q, int64_t g, int64_t begin, int64_t places, float *scores, uint16_t *shares) const {
        const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(1.0f / std::sqrt(float(m.head_dim)));
        int32_t offset = int32_t(q.before + g * GROUP - q.start - begin), window = int32_t(layer.window);
        __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i last = _mm512_add_epi32(lane, _mm512_set1_epi32(offset));
        // Lanes of other requests see some key too: what they find goes nowhere.
        last = _mm512_max_epi32(last, _mm512_setzero_si512());
        __m512i first = window ? _mm512_sub_epi32(last, _mm512_set1_epi32(window - 1)) : _mm512_setzero_si512();
        __m512 most = none, sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < places; j++) {
            __m512i place = _mm512_set1_epi32(int32_t(j));
            __mmask16 seen = _mm512_cmple_epi32_mask(place, last) & _mm512_cmpge_epi32_mask(place, first);
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + j * GROUP), scale);
            x = _mm512_mask_mov_ps(none, seen, x);
            most = _mm512_max_ps(x, most);
            _mm512_storeu_ps(scores + j * GROUP, x);
        }
        auto share = [&](int64_t j) {
            __m512 x = _mm512_loadu_ps(scores + j * GROUP);
            __mmask16 seen = _mm512_cmp_ps_mask(x, none, _CMP_NEQ_UQ);
            Vector power = exponential((Vector)_mm512_sub_ps(x, most));
            __m512 found = _mm512_maskz_mov_ps(seen, (__m512)power);
            sum = _mm512_add_ps(sum, found);
            return found;
        };
        for (int64_t j = 0; j < places; j += 2) {
            __m512 one = share(j);
            pair_up(one, share(j + 1), shares + j * GROUP);
        }
        return _mm512_div_ps(_mm512_set1_ps(1), sum);
    }

    void put(const Queries &q, int64_t g, const float *rows, __m512 inverse, uint16_t *to) const {
        __mmask16 mask = own(q, g);
        for (int64_t i = 0; i < m.head_dim; i += 2) {
            uint16_t pairs[2 * GROUP];
            __m512 one = _mm512_mul_ps(_mm512_loadu_ps(rows + i * GROUP), inverse);
            pair_up(one, _mm512_mul_ps(_mm512_loadu_ps(rows + (i + 1) * GROUP), inverse), pairs);
            _mm512_mask_storeu_epi32(to + i * GROUP, mask, _mm512_loadu_si512(pairs));
        }
    }

    const Model &m;
    const Layer &layer;
    const uint16_t *queries;
    uint16_t *mixed;
    int64_t stride;
};
#endif
