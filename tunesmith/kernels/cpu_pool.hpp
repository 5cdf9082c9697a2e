// The threads of a process that compute its steps.
//
// The caller cuts a phase into parts, and every thread that is there takes the next one until none is left:
//
//     caller   part 0   part 2   part 3 | part 0 ...
//     helper   (wakes up)   part 1      | part 1 ...
//
// Nobody waits for a thread that has taken nothing, so a helper that another program keeps from its core costs no time.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "cpu_places.hpp"

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline void wait_briefly(int spin) {
    if (spin < 2000) pause_briefly();
    else std::this_thread::yield();
}

class Pool {
   public:
    // As many threads as the system gives, which may be fewer.
    explicit Pool(int size) : owner(getpid()), size(size), places(size) {
        try {
            for (; there < size; there++) std::thread([this, id = there] { help(id); }).detach();
        } catch (const std::exception &) {
        }
    }

    // From here to `close`, helpers wait for phases without sleeping.
    void open(int threads) {
        active.store(std::max(1, std::min(threads, there)), std::memory_order_relaxed);
        if (active == 1) return;
        {
            std::lock_guard<std::mutex> lock(mutex);
            is_open.store(true, std::memory_order_release);
        }
        if (sleeping.load() > 0) wake.notify_all();
    }

    // The caller goes where no helper is.
    void settle() const {
        if (active > 1) places.settle();
    }

    void close() { is_open.store(false, std::memory_order_release); }

    int threads() const { return active; }

    // work(0) ... work(count - 1), by any thread; all is done when it returns. Throws std::bad_alloc where a part found
    // no memory.
    template <class Work>
    void phase(int64_t count, const Work &work) {
        if (active == 1 || count <= 1) {
            for (int64_t i = 0; i < count; i++) work(i);
            return;
        }
        call = [](const void *given, int64_t i) { (*static_cast<const Work *>(given))(i); };
        given = &work;
        done.store(0, std::memory_order_relaxed);
        lacks_memory.store(false, std::memory_order_relaxed);
        ticket.store(uint64_t(count) << 32, std::memory_order_release);
        int64_t mine = 0, part;
        for (; (part = take()) >= 0; mine++) attempt([&] { work(part); });
        for (int spin = 0; done.load(std::memory_order_acquire) != count - mine; spin++) wait_briefly(spin);
        if (lacks_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
    }

    const pid_t owner;
    const int size;
    const Places places;
    std::mutex in_use;

   private:
    template <class Work>
    void attempt(const Work &work) {
        try {
            work();
        } catch (const std::bad_alloc &) {
            lacks_memory.store(true, std::memory_order_relaxed);
        }
    }

    static int64_t count_of(uint64_t t) { return t >> 32; }
    static int64_t next_of(uint64_t t) { return t & 0xffffffff; }

    // A part of the phase that runs, or -1. What is taken is of the phase that the ticket names at that moment, and
    // that phase can't end before the part is done.
    int64_t take() {
        uint64_t seen = ticket.load(std::memory_order_acquire);
        if (next_of(seen) >= count_of(seen)) return -1;
        uint64_t mine = ticket.fetch_add(1, std::memory_order_acq_rel);
        return next_of(mine) < count_of(mine) ? next_of(mine) : -1;
    }

    void help(int id) {
        places.bind(id);
        for (int spin = 0;;) {
            int64_t part = id < active.load(std::memory_order_relaxed) ? take() : -1;
            if (part >= 0) {
                attempt([&] { call(given, part); });
                done.fetch_add(1, std::memory_order_release);
                spin = 0;
            } else if (is_open.load(std::memory_order_acquire)) {
                wait_briefly(spin++);
            } else {
                rest();
                spin = 0;
            }
        }
    }

    // Until there is work again: awake for a moment, others first, then asleep.
    void rest() {
        auto begun = std::chrono::steady_clock::now();
        while (!is_open.load(std::memory_order_acquire)) {
            for (int i = 0; i < 32; i++) pause_briefly();
            auto waited = std::chrono::steady_clock::now() - begun;
            if (waited > std::chrono::microseconds(ALERT_US)) return sleep();
            if (waited > std::chrono::microseconds(ALERT_US / 4)) std::this_thread::yield();
        }
    }

    void sleep() {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping++;
        wake.wait(lock, [&] { return is_open.load(std::memory_order_acquire); });
        sleeping--;
    }

    static constexpr int ALERT_US = 60;
    void (*call)(const void *, int64_t) = nullptr;
    const void *given = nullptr;
    int there = 1;  // the caller's with them
    std::atomic<uint64_t> ticket{0};  // 32 bits of the phase's parts, 32 of the next of them
    std::atomic<int64_t> done{0};
    std::atomic<int> active{1}, sleeping{0};
    std::atomic<bool> is_open{false}, lacks_memory{false};
    std::mutex mutex;
    std::condition_variable wake;
};

inline std::atomic<Pool *> shared_pool{nullptr};

// The process's threads. A child of a fork has none of its parent's, so it makes its own; nothing is ever torn down.
inline Pool *pool_of(int size) {
    Pool *pool = shared_pool.load();
    while (pool == nullptr || pool->owner != getpid() || pool->size < size) {
        Pool *made = new Pool(size);
        if (shared_pool.compare_exchange_strong(pool, made)) return made;
    }
    return pool;
}

// The process's threads, this caller's alone as long as it has this.
class Crew {
   public:
    explicit Crew(int threads) : pool(*pool_of(threads)), lock(pool.in_use) {
        pool.open(threads);
        pool.settle();
    }
    ~Crew() { pool.close(); }
    Pool *operator->() { return &pool; }

   private:
    Pool &pool;
    std::lock_guard<std::mutex> lock;
};
