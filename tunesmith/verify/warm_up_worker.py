"""The program that compiles a recipe's kernels: `python -m tunesmith.verify.warm_up_worker`.

    stdin:   {"recipe": {...}, "marker": path}

The rest as `kernels/compiling_worker.py` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.kernels.compiling_worker import serve

if TYPE_CHECKING:
    from tunesmith.kernels.chip import Chip
    from tunesmith.kernels.warm_up import Launch

_FIRST_BF16 = (8, 0)


def find(request: dict[str, Any], chip: Chip) -> list[Launch]:
    """The launches of a recipe."""
    from tunesmith.kernels.chip import foreseeing
    from tunesmith.recipe.load import recipe_from_mapping
    from tunesmith.verify.launches import launches_of

    with foreseeing(chip):
        return launches_of(recipe_from_mapping(request["recipe"]), has_bf16=chip.capability >= _FIRST_BF16)


def device_of(request: dict[str, Any]) -> str:
    """The recipe's device, which a recipe need not name."""
    return str(request["recipe"]["model"].get("device", "auto"))


if __name__ == "__main__":
    serve(find, device_of)
