// Work shared by the threads that torch's own operators run on, and vectors of 16 floats.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "cpu_vectors.hpp"

// libgomp's GOMP_parallel, as torch has loaded it: a second set of threads would fight the first for the cores.
using Fork = void (*)(void (*)(void *), void *, unsigned, unsigned);
inline Fork fork_threads = nullptr;

// work(0) ... work(count - 1), each by whichever thread is free: what a part computes may not depend on the thread.
// Throws std::bad_alloc where a part found no memory.
template <class Work>
void for_each(int64_t count, int64_t threads, const Work &work) {
    struct Shared {
        std::atomic<int64_t> next{0};
        std::atomic<bool> lacks_memory{false};
        int64_t count;
        const Work *work;
    } shared;
    shared.count = count;
    shared.work = &work;
    auto run = [](void *given) {
        Shared *s = static_cast<Shared *>(given);
        try {
            for (int64_t i; (i = s->next.fetch_add(1)) < s->count;) (*s->work)(i);
        } catch (const std::bad_alloc &) {
            s->lacks_memory = true;
        }
    };
    unsigned wanted = unsigned(threads < count ? threads : count);
    if (wanted <= 1) run(&shared);
    else fork_threads(run, &shared, wanted, 0);
    if (shared.lacks_memory) throw std::bad_alloc();
}

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline Vector all(float x) { return x - Vector{}; }

inline Vector load(const float *from, int64_t left) {
    if (left >= LANES) return *(const Vector *)from;
    Vector v = {};
    std::memcpy(&v, from, 4 * left);
    return v;
}

inline void store(float *to, Vector v, int64_t left) {
    if (left >= LANES) *(Vector *)to = v;
    else std::memcpy(to, &v, 4 * left);
}

inline float sum_of(Vector v) {
    float half[LANES / 2], sum = 0;
    for (int i = 0; i < LANES / 2; i++) half[i] = v[i] + v[i + LANES / 2];
    for (int i = 0; i < LANES / 2; i++) sum += half[i];
    return sum;
}

// e^x to float32's precision: 0 below -87, e^88 above 88.
inline Vector exponential(Vector x) {
    Whole none = x < -87.0f;
    Vector y = none ? all(-87.0f) : x;
    y = exponential_within(y > 88.0f ? all(88.0f) : y);
    return none ? Vector{} : y;
}
