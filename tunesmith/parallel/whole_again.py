"""A module that was sharded in place, whole again: as it was handed over, with what it has learnt.

FSDP2 changes a module's class, its parameters and its hooks, and takes nothing of that back. So the module's form is
copied before, without its weights; afterwards it takes that form on again, and the weights are put in.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from tunesmith.model.gathered import gathered

_TORCHS = frozenset(vars(nn.Module()))
"""Attributes that are every module's."""


class WholeAgain:
    """Made before `module` is sharded."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        names: dict[int, Any] = {}
        for parameter in module.parameters():
            empty = torch.empty_like(parameter, device="meta")
            names[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        self._form = copy.deepcopy(module, names)

    def restore(self) -> None:
        """Every process then has all weights; all of them call this. Its submodules are other objects than before.

        It may be sharded again: torch keeps a list of modules that were, by object.
        """
        from torch.distributed import _composable_state

        module, form = self._module, self._form
        weights = whole_weights(module)
        form.load_state_dict(weights, assign=True, strict=False)
        for child, twin in zip(module.modules(), form.modules(), strict=True):
            twin._buffers.update(child._buffers)
            own = vars(twin).keys() - _TORCHS
            vars(twin).update({key: value for key, value in vars(child).items() if key in own}, training=child.training)
        module.__class__ = type(form)
        module.__dict__ = form.__dict__
        _composable_state._module_state_mapping.pop(module, None)


def whole_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that FSDP2 shards, whole, by all of their names; one at each time is gathered anew."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    found: dict[str, nn.Parameter] = {}
    for path, child in module.named_modules():
        if not isinstance(child, FSDPModule):
            continue
        part = cast(nn.Module, child)
        with gathered(part):
            made: dict[int, nn.Parameter] = {}
            for name, parameter in part.named_parameters(path, remove_duplicate=False):
                if isinstance(parameter, DTensor) or name in found:
                    continue  # of a group below, which is gathered by itself
                if id(parameter) not in made:
                    whole = parameter.detach().clone()
                    made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                found[name] = made[id(parameter)]
    return found
