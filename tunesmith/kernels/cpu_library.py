"""Our C++ for answers on a CPU: decoding steps (cpu_step.cpp) and draws (cpu_draw.hpp).

TUNESMITH_CPU_STEP=0 turns it off. Where it can't be compiled there is no library: `load` says so once in the log, and
callers go through torch.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache

from tunesmith.kernels.cpu_compile import BuildError, load_compiled

SWITCH = "TUNESMITH_CPU_STEP"
_log = logging.getLogger(__name__)


@cache
def load() -> ctypes.CDLL | None:
    """The library, compiled where it is not there yet; None where it is not wanted or can't be had."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false", "no"):
        return None
    try:
        library = load_compiled("cpu_step")
    except BuildError as error:
        _log.warning(
            "answers on this CPU go through torch, which is slower: %s (%s=0 asks for that without a word)",
            error,
            SWITCH,
        )
        return None
    library.tunesmith_decoder.restype = ctypes.c_void_p
    library.tunesmith_decoder.argtypes = [ctypes.c_void_p]
    library.tunesmith_forget.argtypes = [ctypes.c_void_p]
    library.tunesmith_step.argtypes = library.tunesmith_prompts.argtypes = [ctypes.c_void_p] * 2
    library.tunesmith_takes_prompts.argtypes = [ctypes.c_void_p]
    library.tunesmith_multiply.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
    library.tunesmith_draw.argtypes = [ctypes.c_void_p]
    library.tunesmith_bind_torch.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.tunesmith_widen.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for name in ("step", "prompts", "takes_prompts", "multiply", "draw"):
        getattr(library, f"tunesmith_{name}").restype = ctypes.c_int64
    for name in ("forget", "widen", "bind_torch"):
        getattr(library, f"tunesmith_{name}").restype = None
    return library
