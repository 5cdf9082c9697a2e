"""Large tensors of a CPU in pages of 2 MiB: a token reads every weight once, and small pages break that stream.

Measured on two cores, in turn a hundred times: a bfloat16 product of one token by [151936, 896] takes 17.2 ms in pages
of 4 KiB and 16.1 ms in huge ones.
"""

from __future__ import annotations

import os

VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""Read by torch's allocator when it allocates its first tensor."""


def use_huge_pages() -> None:
    """Have torch ask the system for huge pages from now on, where it has not allocated yet; who said no is heard."""
    os.environ.setdefault(VARIABLE, "1")
