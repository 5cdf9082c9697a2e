// What training computes between and in its products on a CPU, called from cpu_train.py: float32, the same bits
// whatever the number of threads.
#include <mutex>

#include "cpu_attention.hpp"
#include "cpu_rows.hpp"
#include "cpu_split.hpp"

namespace {

std::mutex in_use;  // memory that calls share

// work(token) for all tokens, by parts.
template <class Work>
void for_tokens(int64_t tokens, int64_t threads, const Work &work) {
    for_each(parts_of(tokens, ROWS), threads, [&](int64_t part) {
        for (int64_t t = part * ROWS; t < least(tokens, (part + 1) * ROWS); t++) work(t);
    });
}

// 0, or -1 where there was not enough memory.
template <class Work>
int64_t finished(const Work &work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc &) {
        return -1;
    }
}

}  // namespace

extern "C" {

void tunesmith_threads(void *fork) { fork_threads = reinterpret_cast<Fork>(fork); }

int64_t tunesmith_can_split() { return can_split(); }

// rstd [tokens, heads] is written, or read where `again`.
void tunesmith_norm(const Rows *x, const Rows *y, const float *weight, float *rstd, float eps, int64_t again,
                    int64_t threads) {
    for_tokens(x->tokens, threads, [&](int64_t t) {
        for (int64_t n = 0; n < x->heads; n++) {
            float &r = rstd[t * x->heads + n];
            if (!again) r = norm_row(x->at(t, n), x->width, eps);
            norm_again(x->at(t, n), weight, x->width, r, y->at(t, n));
        }
    });
}

// add (data or none): what else flows into x. of_weight: [parts, width] of zeros, or none.
void tunesmith_norm_backward(const Rows *grad, const Rows *x, const Rows *add, const Rows *out, const float *weight,
                             const float *rstd, float *of_weight, int64_t threads) {
    int64_t width = x->width;
    for_each(parts_of(x->tokens, ROWS), threads, [&](int64_t part) {
        for (int64_t t = part * ROWS; t < least(x->tokens, (part + 1) * ROWS); t++) {
            for (int64_t n = 0; n < x->heads; n++) {
                norm_row_back(grad->at(t, n), x->at(t, n), weight, width, rstd[t * x->heads + n],
                              add->data ? add->at(t, n) : nullptr, out->at(t, n),
                              of_weight ? of_weight + part * width : nullptr);
            }
        }
    });
}

void tunesmith_rope(const Rows *x, const float *cosine, const float *sine, int64_t inverse, int64_t threads) {
    int64_t half = x->width / 2;
    for_tokens(x->tokens, threads, [&](int64_t t) {
        for (int64_t n = 0; n < x->heads; n++) {
            rotate(x->at(t, n), cosine + t * half, sine + t * half, half, inverse ? -1.0f : 1.0f);
        }
    });
}

// gate_up: heads 0 and 1 are gate and up.
void tunesmith_swiglu(const Rows *gate_up, const Rows *h, int64_t threads) {
    for_tokens(h->tokens, threads, [&](int64_t t) {
        swiglu_row(gate_up->at(t, 0), gate_up->at(t, 1), h->width, h->at(t, 0));
    });
}

void tunesmith_swiglu_backward(const Rows *grad, const Rows *gate_up, const Rows *out, const Rows *h,
                               int64_t threads) {
    for_tokens(grad->tokens, threads, [&](int64_t t) {
        swiglu_row_back(grad->at(t, 0), gate_up->at(t, 0), gate_up->at(t, 1), grad->width, out->at(t, 0),
                        out->at(t, 1), h->data ? h->at(t, 0) : nullptr);
    });
}

// The logits become the gradient of scale * the sum of the losses. A row of target `ignored` has none; a target that
// is no word is read at the nearest one, and its loss is NaN.
void tunesmith_cross_entropy(const Rows *logits, const int64_t *targets, float *losses, float scale, int64_t ignored,
                             int64_t threads) {
    for_tokens(logits->tokens, threads, [&](int64_t t) {
        float *row = logits->at(t, 0), sum;
        int64_t width = logits->width, target = targets[t];
        if (target == ignored) {
            std::memset(row, 0, 4 * width);
            losses[t] = 0;
            return;
        }
        int64_t column = target < 0 ? 0 : least(target, width - 1);
        float of_target = row[column], greatest = softmax_row(row, width, scale, sum);
        row[column] -= scale;
        losses[t] = column == target ? std::log(sum) - (of_target - greatest) : NAN;
    });
}

int64_t tunesmith_attention(const Attention *job, int64_t is_backward, int64_t threads) {
    return finished([&] {
        for_each(job->documents * job->key.heads, threads, [&](int64_t part) {
            Head head(*job, part);
            if (is_backward) head.backward();
            else head.forward();
        });
    });
}

int64_t tunesmith_outer(const Outer *jobs, int64_t count, int64_t tokens, int64_t threads) {
    std::lock_guard<std::mutex> lock(in_use);
    return finished([&] { multiply_outer(jobs, count, tokens, threads); });
}

int64_t tunesmith_product(const Product *job, int64_t threads) {
    std::lock_guard<std::mutex> lock(in_use);
    return finished([&] { multiply(*job, threads); });
}
}
