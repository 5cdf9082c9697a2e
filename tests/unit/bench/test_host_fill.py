"""Host memory taken and given back: as much as was asked for, as much as comes, and what broke."""

from __future__ import annotations

import pytest

from tunesmith.bench.host_fill import HostFill
from tunesmith.units import MIB


class Machine:
    """Says what is free: so many bytes, less a piece at every second look, and more when it has waited."""

    def __init__(self, free: int, grows_after: int | None = None) -> None:
        self.free, self.looks, self.grows_after = free, 0, grows_after

    def available(self) -> int:
        self.looks += 1
        if self.looks == self.grows_after:
            self.free += 100 * MIB
        return self.free


def _fill(machine: Machine, most: int, patience_s: float = 0.0) -> HostFill:
    return HostFill(most, piece_bytes=MIB, reserve_bytes=2 * MIB, patience_s=patience_s, available=machine.available)


def test_as_much_as_was_asked_for() -> None:
    filled = _fill(Machine(100 * MIB), 5 * MIB // 2).wait()
    assert filled.held_bytes == 5 * MIB // 2
    assert (filled.before_bytes, filled.after_bytes) == (100 * MIB, 100 * MIB)
    assert filled.seconds > 0


def test_no_more_than_leaves_the_reserve() -> None:
    assert _fill(Machine(3 * MIB - 1), 10 * MIB).wait().held_bytes == 0


def test_a_machine_that_grows_is_waited_for() -> None:
    filled = _fill(Machine(3 * MIB - 1, grows_after=3), 10 * MIB, patience_s=10.0).wait()
    assert (filled.before_bytes, filled.held_bytes) == (3 * MIB - 1, 10 * MIB)


def test_what_broke_is_raised_to_who_waits() -> None:
    def broken() -> int:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        HostFill(MIB, available=broken).wait()
