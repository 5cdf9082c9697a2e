"""Host memory taken and given back: as much as was asked for, as much as comes, and what broke."""

from __future__ import annotations

import pytest

from tunesmith.bench.host_fill import HostFill
from tunesmith.units import MIB


class Machine:
    """Says what is free, and has more once it was asked often enough while less than `short` was."""

    def __init__(self, free: int, short: int = 0) -> None:
        self.free, self.short, self.looks = free, short, 0

    def available(self) -> int:
        if self.free < self.short:
            self.looks += 1
            self.free += 100 * MIB if self.looks == 2 else 0
        return self.free


def _fill(machine: Machine, most: int) -> HostFill:
    reserves = (4 * MIB, 2 * MIB)
    return HostFill(most, piece_bytes=MIB, reserves_bytes=reserves, patience_s=0.15, available=machine.available)


def test_as_much_as_was_asked_for() -> None:
    filled = _fill(Machine(100 * MIB), 5 * MIB // 2).wait()
    assert filled.held_bytes == 5 * MIB // 2
    assert (filled.before_bytes, filled.after_bytes) == (100 * MIB, 100 * MIB)
    assert filled.seconds > 0


def test_no_more_than_leaves_the_smaller_reserve() -> None:
    assert _fill(Machine(3 * MIB - 1), 10 * MIB).wait().held_bytes == 0
    assert _fill(Machine(3 * MIB), 10 * MIB).wait().held_bytes == 10 * MIB


def test_a_machine_that_grows_is_waited_for() -> None:
    filled = _fill(Machine(3 * MIB, short=5 * MIB), 10 * MIB).wait()
    assert (filled.held_bytes, filled.after_bytes) == (10 * MIB, 103 * MIB)


def test_what_broke_is_raised_to_who_waits() -> None:
    def broken() -> int:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        HostFill(MIB, available=broken).wait()
