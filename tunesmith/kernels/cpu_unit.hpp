// Whether this process may use the matrix unit (AMX): Linux lets one that asks for it.
#pragma once
#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

inline bool may_use_unit() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return allowed;
}
#else
inline bool may_use_unit() { return false; }
#endif
