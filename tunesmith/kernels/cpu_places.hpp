// Which cores a process's threads run on: one each, where there are as many cores as threads.
//
// A thread that waits without sleeping looks as busy as one that works, so a system may leave two on one core beside an
// idle one, for seconds. With fewer threads than cores the system has room, and other processes may be meant for the
// rest: nothing is bound then, nor where the environment says TUNESMITH_CPU_BIND=0,
// or binds torch's threads.
#pragma once
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sched.h>

class Places {
   public:
    explicit Places(int threads) {
        cpu_set_t left;
        if (threads < 2 || !is_wanted() || sched_getaffinity(0, sizeof left, &left)) return;
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (!CPU_ISSET(cpu, &left)) continue;
            cpu_set_t core = siblings(cpu, left);
            CPU_XOR(&left, &left, &core);
            cores.push_back(core);
        }
        if (int(cores.size()) != threads) cores.clear();
    }

    // Whether nothing is bound.
    bool is_empty() const { return cores.empty(); }

    // This thread to core `i`, for good.
    void bind(int i) const {
        if (i < int(cores.size())) sched_setaffinity(0, sizeof(cpu_set_t), &cores[i]);
    }

    // The caller to the core that is nobody else's, if it is on another; it may leave again.
    void settle() const {
        int cpu = cores.empty() ? -1 : sched_getcpu();
        if (cpu < 0 || cpu >= CPU_SETSIZE || CPU_ISSET(cpu, &cores[0])) return;
        cpu_set_t all, both;
        if (sched_getaffinity(0, sizeof all, &all)) return;
        CPU_AND(&both, &all, &cores[0]);
        if (!CPU_COUNT(&both) || sched_setaffinity(0, sizeof both, &both)) return;
        sched_setaffinity(0, sizeof all, &all);
    }

   private:
    static bool is_wanted() {
        for (const char *name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"})
            if (std::getenv(name)) return false;
        const char *said = std::getenv("TUNESMITH_CPU_BIND");
        return !said || (std::strcmp(said, "0") && std::strcmp(said, "off") && std::strcmp(said, "false"));
    }

    // The processors of this one's core, of those that are left.
    static cpu_set_t siblings(int cpu, const cpu_set_t &left) {
        cpu_set_t found;
        CPU_ZERO(&found);
        CPU_SET(cpu, &found);
        std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
        for (int first, last; file >> first; file.ignore()) {
            last = first;
            if (file.peek() == '-') file.ignore(), file >> last;
            for (int i = first; i <= last && i < CPU_SETSIZE; i++)
                if (i >= 0 && CPU_ISSET(i, &left)) CPU_SET(i, &found);
        }
        return found;
    }

    std::vector<cpu_set_t> cores;
};
#else
struct Places {
    explicit Places(int) {}
    bool is_empty() const { return true; }
    void bind(int) const {}
    void settle() const {}
};
#endif
