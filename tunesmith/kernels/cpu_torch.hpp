// torch's own threads on the cores that ours have, before torch computes.
//
// libgomp's threads wait for each other without sleeping, so a system may leave two of them on one core beside an idle
// one; every operation takes as long as they wait then (prompts of 0.2 s took 1.4 on two cores). Ours sleep while torch
// computes, so both kinds have the same cores.
#pragma once
#include "cpu_pool.hpp"

struct TorchThreads {
    void (*fork)(void (*)(void *), void *, unsigned, unsigned);  // libgomp's GOMP_parallel
    int (*number)();                                             // omp_get_thread_num
};

// The caller's team, whose threads may be others than the last time. Nothing where ours are not bound either.
inline void bind_torch(const TorchThreads &torch, int threads) {
    struct Shared {
        const Places &places;
        int (*number)();
    };
    if (threads < 2) return;
    Shared shared{pool_of(threads)->places, torch.number};
    if (shared.places.is_empty()) return;
    shared.places.settle();
    auto bind = [](void *given) {
        thread_local int place = 0;
        Shared *s = static_cast<Shared *>(given);
        int mine = s->number();
        if (mine != place) s->places.bind(mine);
        place = mine;
    };
    torch.fork(bind, &shared, unsigned(threads), 0);
}
