// The threads of a process that compute its steps.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Threads that wait a moment for the next step, then sleep. They hold nothing, and end with the process.
class Pool {
   public:
    using Job = std::function<void(int, int)>;

    explicit Pool(int size) : owner(getpid()), size(size) {
        for (int id = 1; id < size; id++) std::thread([this, id] { work(id); }).detach();
    }

    void run(int count, const Job &job) {
        count = std::max(1, std::min(count, size));
        if (count == 1) return job(0, 1);
        next = &job;
        active = count;
        left.store(size - 1, std::memory_order_relaxed);
        arrived.store(0, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex);
            epoch.fetch_add(1, std::memory_order_release);
        }
        if (sleeping.load() > 0) wake.notify_all();
        job(0, count);
        for (int spin = 0; left.load(std::memory_order_acquire) != 0; spin++) wait(spin);
    }

    // All threads of a job have come here.
    void meet() {
        int count = active;
        if (count == 1) return;
        int phase = turn.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            arrived.store(0, std::memory_order_relaxed);
            turn.fetch_add(1, std::memory_order_release);
            return;
        }
        for (int spin = 0; turn.load(std::memory_order_acquire) == phase; spin++) wait(spin);
    }

    const pid_t owner;
    const int size;
    std::mutex in_use;

   private:
    static void wait(int spin) {
        if (spin < 4000) pause_briefly();
        else std::this_thread::yield();
    }

    void work(int id) {
        uint64_t seen = 0;
        for (;;) {
            auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(60);
            while (epoch.load(std::memory_order_acquire) == seen) {
                for (int i = 0; i < 32; i++) pause_briefly();
                if (std::chrono::steady_clock::now() < until) continue;
                std::unique_lock<std::mutex> lock(mutex);
                sleeping++;
                wake.wait(lock, [&] { return epoch.load(std::memory_order_acquire) != seen; });
                sleeping--;
            }
            seen = epoch.load(std::memory_order_acquire);
            if (id < active) (*next)(id, active);
            left.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    const Job *next = nullptr;
    int active = 1;
    std::atomic<int> left{0}, arrived{0}, turn{0}, sleeping{0};
    std::atomic<uint64_t> epoch{0};
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
