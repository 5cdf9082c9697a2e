// Causal attention of packed documents, and its gradient, float32.
//
//     p_s = exp(scale * q_s k[:e].T - l_s), out_s = p_s v[:e]     for every block of queries s ... e of a document
//     dv += p_s.T g_s;  ds = p_s * (g_s v.T - rowsum(g_s * out_s));  dq_s = scale * ds k;  dk += scale * ds.T q_s
//
// A part is one document's one key head with all query heads that read it, so no two parts write the same place, and
// no document sees another. Held for the backward pass: l, the logarithm of each row's sum of exponentials.
#pragma once
#include <vector>

#include "cpu_blocks.hpp"
#include "cpu_rows.hpp"

struct Attention {
    Rows query, key, value, out, grad, of_query, of_key, of_value;
    float *logs;  // [tokens, query heads]
    const int64_t *starts;  // of the documents, and the end of the last
    int64_t documents;
    float scale;
};

constexpr int64_t QUERIES = 32;  // of a block

// One document's one key head: its keys and values side by side and transposed, padded with zeros to whole vectors.
class Head {
   public:
    Head(const Attention &job, int64_t part) : job(job), kv(part % job.key.heads) {
        int64_t document = part / job.key.heads;
        start = job.starts[document];
        length = job.starts[document + 1] - start;
        width = job.key.width;
        padded = parts_of(length, WIDE) * WIDE + LANES;  // no power of 2: rows would share the cache's few ways
        group = job.query.heads / job.key.heads;
    }

    void forward() {
        take(2 * padded * width + QUERIES * (width + padded));
        float *keys_across = piece(padded * width), *values = piece(padded * width);
        float *rows = piece(QUERIES * width), *p = piece(QUERIES * padded);
        turn(job.key, keys_across);
        copy(job.value, values);
        for_blocks([&](int64_t head, int64_t s, int64_t count, int64_t end) {
            probabilities(head, s, count, end, keys_across, rows, p);
            for (int64_t i = 0; i < count; i++) finish_row(head, s + i, end, p + i * padded);
            add_product(p, padded, 1, values, width, job.out.at(start + s, head), job.out.token_stride, count, width,
                        end, false);
        });
    }

    void backward() {
        take(4 * padded * width + QUERIES * (3 * width + 2 * padded) + 2 * padded * width);
        float *keys_across = piece(padded * width), *values_across = piece(padded * width);
        float *keys = piece(padded * width), *of_keys = piece(padded * width), *of_values = piece(padded * width);
        float *rows = piece(QUERIES * width);
        float *grads = piece(QUERIES * width), *found = piece(QUERIES * width);
        float *p = piece(QUERIES * padded), *d = piece(QUERIES * padded);
        turn(job.key, keys_across);
        turn(job.value, values_across);
        copy(job.key, keys);
        std::memset(of_keys, 0, 4 * padded * width);
        std::memset(of_values, 0, 4 * padded * width);
        for_blocks([&](int64_t head, int64_t s, int64_t count, int64_t end) {
            probabilities(head, s, count, end, keys_across, rows, p);
            for (int64_t i = 0; i < count; i++) {
                std::memcpy(grads + i * width, job.grad.at(start + s + i, head), 4 * width);
            }
            add_product(grads, width, 1, values_across, padded, d, padded, count, parts_of(end, LANES) * LANES, width,
                        false);
            for (int64_t i = 0; i < count; i++) {
                turn_row(head, s + i, end, grads + i * width, p + i * padded, d + i * padded);
            }
            add_product(p, 1, padded, grads, width, of_values, width, end, width, count, true);
            add_product(d, 1, padded, rows, width, of_keys, width, end, width, count, true);
            add_product(d, padded, 1, keys, width, found, width, count, width, end, false);
            for (int64_t i = 0; i < count; i++) {
                scaled(found + i * width, job.of_query.at(start + s + i, head));
            }
        });
        for (int64_t t = 0; t < length; t++) {
            std::memcpy(job.of_key.at(start + t, kv), of_keys + t * width, 4 * width);
            std::memcpy(job.of_value.at(start + t, kv), of_values + t * width, 4 * width);
        }
    }

   private:
    template <class Work>
    void for_blocks(const Work &work) {
        for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
            for (int64_t s = 0; s < length; s += QUERIES) {
                int64_t count = least(QUERIES, length - s);
                work(head, s, count, s + count);
            }
        }
    }

    void take(int64_t count) {
        thread_local std::vector<float> memory;
        if (int64_t(memory.size()) < count + LANES) memory.resize(count + LANES);
        next = memory.data();
        next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64 / 4;
    }

    float *piece(int64_t count) {
        float *at = next;
        next += count;
        return at;
    }

    void copy(const Rows &from, float *to) {
        for (int64_t t = 0; t < length; t++) std::memcpy(to + t * width, from.at(start + t, kv), 4 * width);
    }

    void turn(const Rows &from, float *to) {  // [width, padded]
        for (int64_t i = 0; i < width; i++) std::memset(to + i * padded + length, 0, 4 * (padded - length));
        for (int64_t t = 0; t < length; t++) {
            const float *row = from.at(start + t, kv);
            for (int64_t i = 0; i < width; i++) to[i * padded + t] = row[i];
        }
    }

    // The scores of a block's queries, which are copied to `rows` with the scale in them.
    void probabilities(int64_t head, int64_t s, int64_t count, int64_t end, const float *keys_across, float *rows,
                       float *scores) {
        for (int64_t i = 0; i < count; i++) {
            scaled(job.query.at(start + s + i, head), rows + i * width);
        }
        int64_t columns = parts_of(end, LANES) * LANES;
        add_product(rows, width, 1, keys_across, padded, scores, padded, count, columns, width, false);
    }

    void scaled(const float *from, float *to) {
        for (int64_t j = 0; j < width; j += LANES) *(Vector *)(to + j) = *(const Vector *)(from + j) * job.scale;
    }

    // Scores of position `at` become probabilities, those of later positions zero.
    void finish_row(int64_t head, int64_t at, int64_t end, float *scores) {
        int64_t columns = hide_later(at, end, scores);
        float sum, greatest = softmax_row(scores, columns, 1.0f, sum);
        job.logs[(start + at) * job.query.heads + head] = greatest + std::log(sum);
    }

    // Scores become probabilities once more, and d the gradient of the scores.
    void turn_row(int64_t head, int64_t at, int64_t end, const float *grad, float *p, float *d) {
        const float *out = job.out.at(start + at, head);
        Vector sums = {};
        for (int64_t j = 0; j < width; j += LANES) sums += *(const Vector *)(grad + j) * *(const Vector *)(out + j);
        float along = sum_of(sums), log = job.logs[(start + at) * job.query.heads + head];
        int64_t columns = hide_later(at, end, p);
        for (int64_t j = 0; j < columns; j += LANES) {
            Vector one = exponential(*(const Vector *)(p + j) - log);
            *(Vector *)(p + j) = one;
            *(Vector *)(d + j) = one * (*(const Vector *)(d + j) - along);
        }
    }

    // Scores that position `at` does not see, up to whole vectors, whose number of columns is returned.
    int64_t hide_later(int64_t at, int64_t end, float *scores) {
        int64_t columns = parts_of(end, LANES) * LANES;
        for (int64_t j = at + 1; j < columns; j++) scores[j] = -INFINITY;
        return columns;
    }

    const Attention &job;
    int64_t kv, start, length, width, padded, group;
    float *next = nullptr;
};
