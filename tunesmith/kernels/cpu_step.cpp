// A decoding step of a dense decoder on a CPU: up to 16 sequences with one new token each, all of it in one call.
//
//     embedding, then of every block
//     norm | qkv | head norms, rope, pages, attention | output + stream | norm | gate, up, swiglu | down + stream
//     and the last norm | head
//
// Threads share each phase. The stream is float32; keys and values have the dtype of the pages.
#include <vector>

#include "cpu_attend.hpp"
#include "cpu_draw.hpp"
#include "cpu_math.hpp"
#include "cpu_pool.hpp"
#include "cpu_prompt.hpp"
#include "cpu_torch.hpp"

namespace {

constexpr int64_t LEAST_BYTES = 1 << 15;  // of a weight for one part of a phase
constexpr int PARTS = 8;                  // of a phase for each thread, so that none waits long for another
constexpr int64_t MOST_CODES = 8;         // tokens for which codes are not widened, without a matrix unit
constexpr int64_t FEW_VALUES = 1 << 13;   // that the caller goes through alone

class Decoder {
   public:
    explicit Decoder(const Model &model)
        : m(model), layers(model.layers, model.layers + model.num_layers), prompts(m, layers) {
        widest = std::max({m.width, m.heads * m.head_dim, m.inner});
        qkv_rows = (m.heads + 2 * m.kv_heads) * m.head_dim;
        for (auto *buffer : {&stream, &normed}) buffer->resize(MOST * m.width);
        qkv.resize(MOST * qkv_rows);
        mixed.resize(MOST * m.heads * m.head_dim);
        gated.resize(2 * MOST * m.inner);
        cosine.resize(MOST * m.head_dim);
        sine.resize(MOST * m.head_dim);
        in.ld = padded(widest);
        half.resize(MOST * in.ld);
        codes.resize(MOST * in.ld);
        steps.resize(MOST);
        sums.resize(MOST * in.ld / FINEST);
        in.half = half.data();
        in.codes = codes.data();
        in.steps = steps.data();
        in.sums = sums.data();
        in.tiles = tiles.of(MOST * in.ld);
        int64_t ranks = 0;
        for (const Layer &layer : layers)
            for (const Linear &l : {layer.qkv, layer.output, layer.up, layer.down})
                if (l.low) ranks = std::max(ranks, l.low->down.rows);
        low.resize(MOST * ranks);
    }

    // 0, or BAD_ID.
    int64_t step(const Step &s) {
        Crew crew(int(s.threads));
        for (int64_t t = 0; t < s.tokens; t++)
            if (!embed(s, t)) return BAD_ID;
        turns(s);
        for (Layer &layer : layers) {
            normed_for(layer.qkv.weight, layer.attention_norm, s, crew);
            times(layer.qkv, input_of(normed.data(), m.width), s.tokens, {qkv.data(), qkv_rows, SET}, crew);
            crew->phase(s.tokens * m.kv_heads, [&](int64_t task) {
                thread_local std::vector<float> room;
                attend(layer, s, task / m.kv_heads, task % m.kv_heads, room);
            });
            add(layer.output, mixed.data(), m.heads * m.head_dim, s, crew);
            normed_for(layer.up.weight, layer.mlp_norm, s, crew);
            gate(layer.up, s, crew);
            add(layer.down, gated.data(), 2 * m.inner, s, crew);
        }
        for (int64_t t = 0; t < s.tokens; t++) {
            float *row = &normed[t * m.width];
            norm(&stream[t * m.width], m.final_norm, m.width, m.eps, row);
            for (int64_t i = 0; i < m.width; i++) row[i] = rounded(row[i], m.is_half);
        }
        put_logits(*s.head, s.logits, s.tokens, crew);
        return 0;
    }

    // y of rows of x in the model's dtype: the head. Of more than MOST where `takes_prompts`.
    void multiply(const Weight &w, const void *x, void *y, int64_t tokens, int threads) {
        Crew crew(threads);
        bool as_prompts = w.kind >= INT8 && tokens > MOST_CODES && !has_tiles() && takes_prompts();
        if (tokens > MOST || as_prompts)
            return prompts.multiply(w, static_cast<const uint16_t *>(x), static_cast<uint16_t *>(y), tokens, crew);
        for (int64_t t = 0; t < tokens; t++) widen_row(x, t, m.is_half, &normed[t * m.width]);
        put_logits(w, y, tokens, crew);
    }

    bool takes_prompts() const { return PromptPass::takes(m, layers); }

    PromptPass &pass_of_prompts() { return prompts; }

   private:
    bool embed(const Step &s, int64_t t) {
        int64_t id = s.ids[t] < 0 ? s.last_ids[-1 - s.ids[t]] : s.ids[t];
        if (id < 0 || id >= m.vocab) return false;
        float *row = &stream[t * m.width];
        widen_row(m.table, id, m.is_half_table, row);
        for (int64_t i = 0; i < m.width; i++) row[i] = rounded(row[i], m.is_half);
        return true;
    }

    void turns(const Step &s) {
        int64_t half = m.head_dim / 2;
        for (int64_t t = 0; t < s.tokens && m.inverse; t++) {
            for (int64_t i = 0; i < half; i++) {
                float angle = float(s.positions[t]) * m.inverse[i];
                cosine[t * half + i] = rounded(std::cos(angle), m.is_half);
                sine[t * half + i] = rounded(std::sin(angle), m.is_half);
            }
        }
    }

    void widen_row(const void *from, int64_t row, bool is_half, float *to) const {
        if (is_half) widen_all(static_cast<const uint16_t *>(from) + row * m.width, m.width, to);
        else std::memcpy(to, static_cast<const float *>(from) + row * m.width, 4 * m.width);
    }

    // work(t) of every token, by this thread alone where that is little.
    template <class Work>
    static void each(int64_t tokens, int64_t width, Crew &crew, const Work &work) {
        if (tokens * width > FEW_VALUES) return crew->phase(tokens, work);
        for (int64_t t = 0; t < tokens; t++) work(t);
    }

    void normed_for(const Weight &w, const float *weight, const Step &s, Crew &crew) {
        each(s.tokens, m.width, crew, [&](int64_t t) {
            norm(&stream[t * m.width], weight, m.width, m.eps, &normed[t * m.width]);
        });
        ready(w, normed.data(), m.width, s.tokens, crew);
    }

    // x in the form that products with this weight read.
    void ready(const Weight &w, const float *x, int64_t ld, int64_t tokens, Crew &crew) {
        if (w.kind == FLOAT32) return;
        int parts = tokens * w.width > FEW_VALUES ? crew->threads() : 1;
        crew->phase(parts, [&](int64_t part) { prepare(w, x, ld, in, tokens, int(part), parts); });
    }

    Input input_of(const float *x, int64_t ld) const {
        Input found = in;
        found.wide = x;
        found.wide_ld = ld;
        return found;
    }

    // work(first, last) over `rows` rows of a weight, several parts for each thread.
    template <class Work>
    static void by_rows(const Weight &w, int64_t rows, Crew &crew, const Work &work) {
        int64_t row_bytes = w.width * (w.kind == FLOAT32 ? 8 : w.kind == BFLOAT16 ? 4 : w.kind == INT8 ? 2 : 1) / 2;
        int64_t size = std::max(rows / (PARTS * crew->threads()), LEAST_BYTES / std::max<int64_t>(1, row_bytes));
        int64_t unit = size < 64 ? 16 : 64;
        size = (size + unit - 1) / unit * unit;
        crew->phase((rows + size - 1) / size, [&](int64_t i) { work(i * size, std::min(rows, (i + 1) * size)); });
    }

    void times(const Linear &l, const Input &x, int64_t tokens, const Output &out, Crew &crew) {
        lower(l, x, tokens, crew);
        by_rows(l.weight, l.weight.rows, crew, [&](int64_t first, int64_t last) {
            rows(l, x, tokens, first, last, out);
        });
    }

    // low = down x, where there are adapters.
    void lower(const Linear &l, const Input &x, int64_t tokens, Crew &crew) {
        if (!l.low) return;
        const Weight &down = l.low->down;
        bool is_ready = goes_by_columns(down, tokens) == goes_by_columns(l.weight, tokens);
        if (!is_ready) ready(down, x.wide, x.wide_ld, tokens, crew);
        times({down, nullptr}, x, tokens, {low.data(), down.rows, SET}, crew);
    }

    // Rows first .. last of y, `low` being there.
    void rows(const Linear &l, const Input &x, int64_t tokens, int64_t first, int64_t last, const Output &out) const {
        product(l.weight, x, int(tokens), first, last, out);
        if (l.low) add_low_rank(*l.low, low.data(), tokens, first, last, static_cast<float *>(out.data), out.ld);
    }

    void put_logits(const Weight &w, void *to, int64_t tokens, Crew &crew) {
        ready(w, normed.data(), m.width, tokens, crew);
        Input x = input_of(normed.data(), m.width);
        times({w, nullptr}, x, tokens, {to, w.rows, m.is_half ? SET_BFLOAT16 : SET}, crew);
    }

    // stream += x @ w.T
    void add(const Linear &l, const float *x, int64_t ld, const Step &s, Crew &crew) {
        ready(l.weight, x, ld, s.tokens, crew);
        times(l, input_of(x, ld), s.tokens, {stream.data(), m.width, ADD}, crew);
    }

    // gated[t, :inner] = silu(gate) * up; up's rows lie behind gate's.
    void gate(const Linear &l, const Step &s, Crew &crew) {
        Input x = input_of(normed.data(), m.width);
        Output out{gated.data(), 2 * m.inner, SET};
        lower(l, x, s.tokens, crew);
        by_rows(l.weight, m.inner, crew, [&](int64_t first, int64_t last) {
            rows(l, x, s.tokens, first, last, out);
            rows(l, x, s.tokens, m.inner + first, m.inner + last, out);
            for (int64_t t = 0; t < s.tokens; t++) {
                float *gate = &gated[2 * t * m.inner];
                const float *up = gate + m.inner;
                for (int64_t i = first; i < last; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
            }
        });
    }

    void attend(Layer &layer, const Step &s, int64_t t, int64_t kv, std::vector<float> &room) {
        int64_t H = m.head_dim, group = m.heads / m.kv_heads, slot = s.slots[t];
        float *query = &qkv[t * qkv_rows + kv * group * H];
        float *key = &qkv[t * qkv_rows + (m.heads + kv) * H], *value = key + m.kv_heads * H;
        for (int64_t g = 0; g < group; g++) turn(query + g * H, layer.query_norm, t);
        turn(key, layer.key_norm, t);
        int64_t row = m.kv_heads * H;
        if (slot >= 0) {
            write_all(key, H, layer.keys, slot * row + kv * H, m.is_half);
            write_all(value, H, layer.values, slot * row + kv * H, m.is_half);
        }
        float *to = &mixed[(t * m.heads + kv * group) * H];
        attend_one(m, layer, s.tables + t * s.table_ld, s.contexts[t], kv, query, to, room);
    }

    void turn(float *head, const float *weight, int64_t t) {
        int64_t half = m.head_dim / 2;
        if (weight) norm(head, weight, m.head_dim, m.head_eps, head);
        if (m.inverse) rotate(head, &cosine[t * half], &sine[t * half], half);
    }

    Model m;
    std::vector<Layer> layers;
    PromptPass prompts;
    int64_t widest, qkv_rows;
    Input in{};
    std::vector<float> stream, normed, qkv, low, mixed, gated, cosine, sine, steps, sums;
    std::vector<uint16_t> half;
    Room<uint16_t> tiles;  // whole lines, so that no load of one is two
    std::vector<int16_t> codes;
};

// An int4 weight as bfloat16 [rows, width]: (code - zero) * scale, rounded once.
void widen_int4(const Weight &w, uint16_t *to, int threads) {
    int64_t blocks = padded(w.width) / BLOCK, each = BLOCK / w.group;
    Crew crew(threads);
    crew->phase((w.rows + 63) / 64, [&](int64_t part) {
        for (int64_t row = part * 64; row < std::min(w.rows, part * 64 + 64); row++) {
            const int32_t *words = static_cast<const int32_t *>(w.data) + row * blocks * LANES;
            for (int64_t k = 0; k < w.width; k += LANES) {
                int64_t block = k / BLOCK, plane = k % BLOCK / LANES;
                int64_t group = (row * blocks + block) * each + k % BLOCK / w.group;
                Whole codes = (*(const Whole *)(words + block * LANES) >> int(4 * plane)) & 15;
                Vector x = __builtin_convertvector(codes, Vector) - float(w.zeros ? w.zeros[group] : 8);
                Words bits = (Words)(x * w.scale[group]);
                Halves half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
                std::memcpy(to + row * w.width + k, &half, 2 * std::min<int64_t>(LANES, w.width - k));
            }
        }
    });
}

// What work returns, or NO_MEMORY.
template <class Work>
int64_t status_of(const Work &work) {
    try {
        return work();
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}

}  // namespace

extern "C" {
void tunesmith_widen(const Weight *w, uint16_t *to, int64_t threads) { widen_int4(*w, to, int(threads)); }
void *tunesmith_decoder(const Model *model) {
    Decoder *made = nullptr;
    status_of([&] { return made = new Decoder(*model), 0; });
    return made;
}
void tunesmith_forget(void *decoder) { delete static_cast<Decoder *>(decoder); }
int64_t tunesmith_step(void *decoder, const Step *step) {
    return status_of([&] { return static_cast<Decoder *>(decoder)->step(*step); });
}
int64_t tunesmith_takes_prompts(void *decoder) { return static_cast<Decoder *>(decoder)->takes_prompts(); }
int64_t tunesmith_prompts(void *decoder, const Prompts *given) {
    return status_of([&] { return static_cast<Decoder *>(decoder)->pass_of_prompts().run(*given); });
}
int64_t tunesmith_draw(const Draw *given) {
    return status_of([&] { return draw::tokens_of(*given), 0; });
}
int64_t tunesmith_multiply(void *decoder, const Weight *w, const void *x, void *y, int64_t tokens, int64_t threads) {
    return status_of([&] { return static_cast<Decoder *>(decoder)->multiply(*w, x, y, tokens, int(threads)), 0; });
}
void tunesmith_bind_torch(const TorchThreads *torch, int64_t threads) { bind_torch(*torch, int(threads)); }
int64_t tunesmith_has_tiles() { return has_tiles(); }
}
