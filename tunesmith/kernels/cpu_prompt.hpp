// A step with prompts in it, in bfloat16: as cpu_step.cpp's, with any number of new tokens a request, of weights in
// bfloat16, int8 or int4. All between the embedding and the last norm goes by groups of 16 tokens (cpu_panels.hpp).
#pragma once
#include "cpu_attend.hpp"
#include "cpu_pool.hpp"
#include "cpu_prompt_attention.hpp"
#include "cpu_widen.hpp"

#if WIDE

class PromptPass {
   public:
    PromptPass(const Model &model, const std::vector<Layer> &layers) : m(model), layers(layers) {
        qkv_rows = (m.heads + 2 * m.kv_heads) * m.head_dim;
        mixed_rows = m.heads * m.head_dim;
    }

    // Whether a decoder's weights are of the kind that is computed here.
    static bool takes(const Model &m, const std::vector<Layer> &layers) {
        bool found = m.is_half && m.is_half_table && m.head_dim % 2 == 0;
        for (const Layer &layer : layers)
            for (const Linear &l : {layer.qkv, layer.output, layer.up, layer.down})
                found &= !l.low && l.weight.kind != FLOAT32 && !factors_of(l.weight) && l.weight.width % 2 == 0;
        return found;
    }

    // 0, or BAD_ID.
    int64_t run(const Prompts &p) {
        for (int64_t t = 0; t < p.tokens; t++)
            if (p.ids[t] < 0 || p.ids[t] >= m.vocab) return BAD_ID;
        Crew crew(int(p.threads));
        begin(p, crew);
        for (const Layer &layer : layers) {
            crew->settle();
            normed(layer.attention_norm, crew);
            product(layer.qkv.weight, x, crew, [&](int64_t g, int64_t row, const float *sums, int64_t count) {
                std::memcpy(qkv + (g * qkv_rows + row) * GROUP, sums, 4 * count * GROUP);
            });
            crew->phase(groups, [&](int64_t g) { turn(layer, p, g); });
            attend(layer, crew);
            add(layer.output.weight, mixed, crew);
            normed(layer.mlp_norm, crew);
            gate(layer.up.weight, crew);
            add(layer.down.weight, gated, crew);
        }
        crew->phase(groups, [&](int64_t g) { finish(p, g); });
        return 0;
    }

    // y [tokens, w.rows] of x [tokens, w.width], both bfloat16.
    void multiply(const Weight &w, const uint16_t *from, uint16_t *y, int64_t tokens, Crew &crew) {
        groups = (tokens + GROUP - 1) / GROUP;
        x = x_room.of(groups * GROUP * w.width);
        crew->phase(groups, [&](int64_t g) {
            for (int64_t l = 0; l < std::min(GROUP, tokens - g * GROUP); l++) {
                const uint16_t *row = from + (g * GROUP + l) * w.width;
                uint16_t *to = x + g * w.width * GROUP + 2 * l;
                for (int64_t i = 0; i < w.width; i += 2, to += 2 * GROUP) std::memcpy(to, row + i, 4);
            }
        });
        product(w, x, crew, [&](int64_t g, int64_t row, const float *sums, int64_t count) {
            put_tokens(sums, count, [&](int64_t l) {
                int64_t t = g * GROUP + l;
                return t < tokens ? y + t * w.rows + row : nullptr;
            });
        });
    }

   private:
    static constexpr int64_t CHUNK = 12;  // groups of a part: their x stays in a core's cache
    static constexpr int64_t FEW = 4;     // new tokens of a request that go one by one: lanes would be empty
    static constexpr int PARTS = 4;       // of a phase for each thread, at least

    void begin(const Prompts &p, Crew &crew) {
        groups = (p.tokens + GROUP - 1) / GROUP;
        int64_t all = groups * GROUP;
        stream = stream_room.of(all * m.width);
        qkv = qkv_room.of(all * qkv_rows);
        cosine = turns_room.of(all * m.head_dim);
        sine = cosine + all * m.head_dim / 2;
        x = x_room.of(all * m.width);
        queries = queries_room.of(all * mixed_rows);
        mixed = mixed_room.of(all * mixed_rows);
        gated = gated_room.of(all * m.inner);
        crew->phase(groups, [&](int64_t g) { embed(p, g); });
        plan(p);
    }

    void embed(const Prompts &p, int64_t g) {
        int64_t half = m.head_dim / 2;
        for (int64_t l = 0; l < std::min(GROUP, p.tokens - g * GROUP); l++) {
            int64_t t = g * GROUP + l;
            const uint16_t *row = static_cast<const uint16_t *>(m.table) + p.ids[t] * m.width;
            float *to = stream + g * m.width * GROUP + l;
            for (int64_t i = 0; i < m.width; i++) to[i * GROUP] = widen(row[i]);
            for (int64_t i = 0; i < half && m.inverse; i++) {
                float angle = float(p.positions[t]) * m.inverse[i];
                cosine[(g * half + i) * GROUP + l] = rounded(std::cos(angle), true);
                sine[(g * half + i) * GROUP + l] = rounded(std::sin(angle), true);
            }
        }
    }

    // Requests with several tokens by up to as many groups as go at a time, others token by token.
    void plan(const Prompts &p) {
        blocks.clear();
        singles.clear();
        for (int64_t r = 0; r < p.requests; r++) {
            int64_t start = p.starts[r], end = p.starts[r + 1], before = p.contexts[r] - (end - start);
            const int32_t *table = p.tables + r * p.table_ld;
            for (int64_t t = start; t < end && end - start < FEW; t++)
                singles.push_back({t / GROUP, t / GROUP + 1, t, t + 1, before + t - start, table});
            if (end - start < FEW) continue;
            int64_t last = (end + GROUP - 1) / GROUP;
            for (int64_t g = start / GROUP; g < last; g += MOST_GROUPS)
                blocks.push_back({g, std::min(last, g + MOST_GROUPS), start, end, before, table});
        }
        // The longest first, so that no thread begins one as the others end.
        std::stable_sort(blocks.begin(), blocks.end(), [](const Queries &a, const Queries &b) {
            return a.before + a.last * GROUP - a.start > b.before + b.last * GROUP - b.start;
        });
    }

    // The factor of each token: rows of 16 tokens, their norm.
    static __m512 scale_of(const float *rows, int64_t width, float eps) {
        __m512 sum[4] = {};
        for (int64_t i = 0; i < width; i++) {
            __m512 v = _mm512_loadu_ps(rows + i * GROUP);
            sum[i % 4] = _mm512_fmadd_ps(v, v, sum[i % 4]);
        }
        __m512 all = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
        all = _mm512_add_ps(_mm512_div_ps(all, _mm512_set1_ps(float(width))), _mm512_set1_ps(eps));
        return _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(all));
    }

    void normed(const float *weight, Crew &crew) {
        crew->phase(groups, [&](int64_t g) {
            const float *rows = stream + g * m.width * GROUP;
            __m512 scale = scale_of(rows, m.width, m.eps);
            auto row = [&](int64_t i) {
                __m512 one = _mm512_mul_ps(_mm512_loadu_ps(rows + i * GROUP), scale);
                return _mm512_mul_ps(one, _mm512_set1_ps(weight[i]));
            };
            for (int64_t i = 0; i < m.width; i += 2) {
                __m512 first = row(i);
                pair_up(first, row(i + 1), x + (g * m.width + i) * GROUP);
            }
        });
    }

    // work(first row, rows, first group, last): parts of a product.
    template <class Work>
    void by_parts(int64_t rows, Crew &crew, const Work &work) {
        int64_t chunks = (groups + CHUNK - 1) / CHUNK, unit = PART_ROWS;
        while (unit > 8 && (rows + unit - 1) / unit * chunks < PARTS * crew->threads()) unit /= 2;
        crew->phase((rows + unit - 1) / unit * chunks, [&](int64_t part) {
            int64_t row = part / chunks * unit, from = part % chunks * CHUNK;
            work(row, std::min(unit, rows - row), from, std::min(groups, from + CHUNK));
        });
    }

    // put(group, row, sums, count)
    template <class Put>
    void product(const Weight &w, const uint16_t *from, Crew &crew, const Put &put) {
        by_parts(w.rows, crew, [&](int64_t row, int64_t count, int64_t first, int64_t last) {
            product_by_groups(widened(w, row, count), from, count, first, last, [&](int64_t g, float *sums) {
                finish_sums(w, row, count, sums);
                put(g, row, sums, count);
            });
        });
    }

    // Their rows' scales and biases.
    static void finish_sums(const Weight &w, int64_t row, int64_t count, float *sums) {
        const float *scale = w.kind == INT8 ? w.scale + row : nullptr, *bias = w.bias ? w.bias + row : nullptr;
        for (int64_t r = 0; r < count && (scale || bias); r++) {
            __m512 factor = _mm512_set1_ps(scale ? scale[r] : 1), more = _mm512_set1_ps(bias ? bias[r] : 0);
            _mm512_storeu_ps(sums + r * GROUP, _mm512_fmadd_ps(_mm512_loadu_ps(sums + r * GROUP), factor, more));
        }
    }

    // stream += from @ w.T
    void add(const Weight &w, const uint16_t *from, Crew &crew) {
        product(w, from, crew, [&](int64_t g, int64_t row, const float *sums, int64_t count) {
            float *to = stream + (g * m.width + row) * GROUP;
            for (int64_t i = 0; i < count * GROUP; i++) to[i] += sums[i];
        });
    }

    // silu(gate) * up; up's rows lie behind gate's.
    void gate(const Weight &w, Crew &crew) {
        by_parts(m.inner, crew, [&](int64_t row, int64_t count, int64_t first, int64_t last) {
            thread_local Room<float> room;
            float *gates = room.of(CHUNK * PART_ROWS * GROUP);
            auto place = [&](int64_t g) { return gates + (g - first) * PART_ROWS * GROUP; };
            product_by_groups(widened(w, row, count), x, count, first, last, [&](int64_t g, float *sums) {
                finish_sums(w, row, count, sums);
                std::memcpy(place(g), sums, 4 * count * GROUP);
            });
            int64_t behind = m.inner + row;
            product_by_groups(widened(w, behind, count), x, count, first, last, [&](int64_t g, float *sums) {
                finish_sums(w, behind, count, sums);
                uint16_t *to = gated + (g * m.inner + row) * GROUP;
                for (int64_t i = 0; i < count; i += 2) {
                    __m512 one = swiglu(place(g) + i * GROUP, sums + i * GROUP);
                    pair_up(one, swiglu(place(g) + (i + 1) * GROUP, sums + (i + 1) * GROUP), to + i * GROUP);
                }
            });
        });
    }

    static __m512 swiglu(const float *gate, const float *up) {
        Vector g = *(const Vector *)gate;
        return (__m512)(g / (1.0f + exponential(-g)) * *(const Vector *)up);
    }

    // The norms and turns of a group's heads; keys and values to their pages, queries as products read them.
    void turn(const Layer &layer, const Prompts &p, int64_t g) {
        int64_t H = m.head_dim, row = m.kv_heads * H;
        float *own = qkv + g * qkv_rows * GROUP;
        for (int64_t n = 0; n < m.heads; n++) {
            float *rows = own + n * H * GROUP;
            turn_head(rows, layer.query_norm, g);
            uint16_t *to = queries + (g * m.heads + n) * H * GROUP;
            for (int64_t i = 0; i < H; i += 2)
                pair_up(_mm512_loadu_ps(rows + i * GROUP), _mm512_loadu_ps(rows + (i + 1) * GROUP), to + i * GROUP);
        }
        for (int64_t n = 0; n < 2 * m.kv_heads; n++) {
            float *rows = own + (m.heads + n) * H * GROUP;
            bool is_key = n < m.kv_heads;
            if (is_key) turn_head(rows, layer.key_norm, g);
            uint16_t *pages = static_cast<uint16_t *>(is_key ? layer.keys : layer.values) + n % m.kv_heads * H;
            put_tokens(rows, H, [&](int64_t l) {
                int64_t t = g * GROUP + l, slot = t < p.tokens ? p.slots[t] : -1;
                return slot < 0 ? nullptr : pages + slot * row;
            });
        }
    }

    void turn_head(float *rows, const float *weight, int64_t g) {
        int64_t H = m.head_dim, half = H / 2;
        __m512 scale = weight ? scale_of(rows, H, m.head_eps) : _mm512_set1_ps(1);
        for (int64_t i = 0; i < H && weight; i++) {
            __m512 one = _mm512_mul_ps(_mm512_loadu_ps(rows + i * GROUP), scale);
            _mm512_storeu_ps(rows + i * GROUP, _mm512_mul_ps(one, _mm512_set1_ps(weight[i])));
        }
        for (int64_t i = 0; i < half && m.inverse; i++) {
            float *low = rows + i * GROUP, *high = low + half * GROUP;
            __m512 first = _mm512_loadu_ps(low), second = _mm512_loadu_ps(high);
            __m512 c = _mm512_loadu_ps(cosine + (g * half + i) * GROUP);
            __m512 s = _mm512_loadu_ps(sine + (g * half + i) * GROUP);
            _mm512_storeu_ps(low, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
            _mm512_storeu_ps(high, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
        }
    }

    void attend(const Layer &layer, Crew &crew) {
        PromptAttention several(m, layer, queries, mixed);
        int64_t num_blocks = int64_t(blocks.size()), num = num_blocks + int64_t(singles.size());
        crew->phase(num * m.kv_heads, [&](int64_t task) {
            int64_t item = task / m.kv_heads, kv = task % m.kv_heads;
            if (item < num_blocks) several(blocks[item], kv);
            else single(layer, singles[item - num_blocks], kv);
        });
    }

    void single(const Layer &layer, const Queries &q, int64_t kv) {
        thread_local std::vector<float> room, both;
        int64_t H = m.head_dim, count = m.heads / m.kv_heads * H;
        int64_t place = (q.first * mixed_rows + kv * count) * GROUP + q.start % GROUP * 2;
        auto at = [&](int64_t i) { return place + i / 2 * 2 * GROUP + i % 2; };
        both.resize(2 * count);
        for (int64_t i = 0; i < count; i++) both[i] = widen(queries[at(i)]);
        attend_one(m, layer, q.table, q.before + 1, kv, both.data(), both.data() + count, room);
        for (int64_t i = 0; i < count; i++) mixed[at(i)] = narrow(both[count + i]);
    }

    void finish(const Prompts &p, int64_t g) {
        float *rows = stream + g * m.width * GROUP;
        __m512 scale = scale_of(rows, m.width, m.eps);
        for (int64_t i = 0; i < m.width; i++) {
            __m512 one = _mm512_mul_ps(_mm512_loadu_ps(rows + i * GROUP), scale);
            _mm512_storeu_ps(rows + i * GROUP, _mm512_mul_ps(one, _mm512_set1_ps(m.final_norm[i])));
        }
        put_tokens(rows, m.width, [&](int64_t l) {
            int64_t t = g * GROUP + l;
            return t < p.tokens ? static_cast<uint16_t *>(p.hidden) + t * m.width : nullptr;
        });
    }

    const Model &m;
    const std::vector<Layer> &layers;
    int64_t qkv_rows, mixed_rows, groups = 0;
    std::vector<Queries> blocks, singles;
    Room<float> stream_room, qkv_room, turns_room;
    Room<uint16_t> x_room, queries_room, mixed_room, gated_room;
    float *stream = nullptr, *qkv = nullptr, *cosine = nullptr, *sine = nullptr;
    uint16_t *x = nullptr, *queries = nullptr, *mixed = nullptr, *gated = nullptr;
};

#else

struct PromptPass {
    PromptPass(const Model &, const std::vector<Layer> &) {}
    static bool takes(const Model &, const std::vector<Layer> &) { return false; }
    int64_t run(const Prompts &) { return BAD_ID; }
    void multiply(const Weight &, const uint16_t *, uint16_t *, int64_t, Crew &) {}
};

#endif
