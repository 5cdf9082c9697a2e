"""Number formats: how many bytes a value takes, its scales included."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """A storage format of a weight.

    `bits` per value; one scale of `scale_bytes` for every `group_size` values (0: no scales), and
    one second-level scale of 4 bytes for every `scale_group_size` scales (0: scales are plain).
    """

    name: str
    bits: int
    group_size: int = 0
    scale_bytes: int = 0
    scale_group_size: int = 0

    def bytes_for(self, num_values: int) -> int:
        """Bytes that `num_values` values take, scales of both levels included (a lone offset of 4 bytes too)."""
        total = -(-num_values * self.bits // 8)
        if not self.group_size:
            return total
        num_scales = -(-num_values // self.group_size)
        total += num_scales * self.scale_bytes
        if self.scale_group_size:
            total += 4 * -(-num_scales // self.scale_group_size) + 4
        return total


FORMATS = {
    f.name: f
    for f in (
        NumberFormat("float32", 32),
        NumberFormat("bfloat16", 16),
        NumberFormat("float16", 16),
        NumberFormat("fp8", 8),
        NumberFormat("nf4", 4, group_size=64, scale_bytes=4),
        NumberFormat("nf4-double", 4, group_size=64, scale_bytes=1, scale_group_size=256),
    )
}
