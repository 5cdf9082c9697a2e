// The operations between a block's products, float32, in as few trips through memory as there can be.
#pragma once
#include "cpu_threads.hpp"

constexpr int64_t ROWS = 32;  // of a part

// x [tokens, heads, width] with rows that are apart by these strides.
struct Rows {
    float *data;
    int64_t tokens, heads, width, token_stride, head_stride;

    float *at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

inline void norm_again(const float *x, const float *weight, int64_t width, float rstd, float *y) {
    for (int64_t i = 0; i < width; i += LANES) {
        store(y + i, load(x + i, width - i) * rstd * load(weight + i, width - i), width - i);
    }
}

inline float norm_row(const float *x, int64_t width, float eps) {
    Vector sum = {};
    for (int64_t i = 0; i < width; i += LANES) {
        Vector v = load(x + i, width - i);
        sum += v * v;
    }
    return 1.0f / std::sqrt(sum_of(sum) / float(width) + eps);
}

// The gradient of x, plus `add` where given; `of_weight` (or none) gathers grad * x * rstd.
inline void norm_row_back(const float *grad, const float *x, const float *weight, int64_t width, float rstd,
                          const float *add, float *out, float *of_weight) {
    Vector sum = {};
    for (int64_t i = 0; i < width; i += LANES) {
        Vector g = load(grad + i, width - i), v = load(x + i, width - i);
        sum += g * load(weight + i, width - i) * v;
        if (of_weight) store(of_weight + i, load(of_weight + i, width - i) + g * v * rstd, width - i);
    }
    float along = -sum_of(sum) * rstd * rstd * rstd / float(width);
    for (int64_t i = 0; i < width; i += LANES) {
        Vector d = load(grad + i, width - i) * load(weight + i, width - i) * rstd + load(x + i, width - i) * along;
        if (add) d += load(add + i, width - i);
        store(out + i, d, width - i);
    }
}

inline void rotate(float *x, const float *cosine, const float *sine, int64_t half, float sign) {
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t left = half - i;
        Vector first = load(x + i, left), second = load(x + half + i, left);
        Vector c = load(cosine + i, left), s = load(sine + i, left) * sign;
        store(x + i, first * c - second * s, left);
        store(x + half + i, second * c + first * s, left);
    }
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline void swiglu_row(const float *gate, const float *up, int64_t width, float *h) {
    for (int64_t i = 0; i < width; i += LANES) {
        Vector g = load(gate + i, width - i);
        store(h + i, g * sigmoid(g) * load(up + i, width - i), width - i);
    }
}

// What is written may lie over gate and up. h (or none): the activation once more.
inline void swiglu_row_back(const float *grad, const float *gate, const float *up, int64_t width, float *of_gate,
                            float *of_up, float *h) {
    for (int64_t i = 0; i < width; i += LANES) {
        int64_t left = width - i;
        Vector d = load(grad + i, left), g = load(gate + i, left), u = load(up + i, left);
        Vector s = sigmoid(g), activated = g * s;
        if (h) store(h + i, activated * u, left);
        store(of_gate + i, d * u * s * (1.0f + g * (1.0f - s)), left);
        store(of_up + i, d * activated, left);
    }
}

// The row becomes factor * its softmax; returns its greatest value, and the sum of exponentials below that.
inline float softmax_row(float *x, int64_t width, float factor, float &sum) {
    Vector most = all(-INFINITY);
    for (int64_t i = 0; i < width; i += LANES) {
        if (width - i < LANES) {
            for (int64_t j = i; j < width; j++) most[0] = x[j] > most[0] ? x[j] : most[0];
            break;
        }
        Vector v = *(const Vector *)(x + i);
        most = v > most ? v : most;
    }
    float greatest = most[0];
    for (int i = 1; i < LANES; i++) greatest = most[i] > greatest ? most[i] : greatest;
    Vector total = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Vector e = exponential(*(const Vector *)(x + i) - greatest);
        *(Vector *)(x + i) = e;
        total += e;
    }
    sum = sum_of(total);
    if (i < width) {
        Vector e = exponential(load(x + i, width - i) - greatest);
        store(x + i, e, width - i);
        for (int64_t j = i; j < width; j++) sum += x[j];
    }
    float scale = factor / sum;
    for (i = 0; i < width; i += LANES) store(x + i, load(x + i, width - i) * scale, width - i);
    return greatest;
}
