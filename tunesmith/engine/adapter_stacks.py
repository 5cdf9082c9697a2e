"""Many adapters on one model: its linears with stacks, and which adapter each token of the next pass takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.runner import NativeRunner
from tunesmith.errors import UnsupportedModelError
from tunesmith.kernels.multi_lora import token_adapters, token_adapters_on_device
from tunesmith.kernels.multi_lora_tiles import NO_ADAPTER
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.multi_lora import add_stacks, remove_stacks


class AdapterStacks:
    """A decoder whose linears have `num_slots` places for adapters each. `close` gives the decoder back as it was.

    invariant: a row's sums have one order, however many tokens a pass has.
    Raises: UnsupportedModelError for a model that is not the native decoder, or has an adapter on it already.
    """

    def __init__(self, model: LanguageModel, num_slots: int, max_rank: int, *, invariant: bool = False) -> None:
        if not isinstance(model, Decoder):
            raise UnsupportedModelError(
                "several adapters at once are for models of the native decoder, not for the transformers backend: "
                "serve one adapter with adapter=..., or merge it"
            )
        if any(isinstance(child, AdaptedLinear) for child in model.modules()):
            raise UnsupportedModelError(
                "the model has an adapter on it already: give the base alone, and load this adapter beside the others"
            )
        self.model = model
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.invariant = invariant
        self.device = model.embedding.weight.device
        dtype = model.compute_dtype or model.embedding.weight.dtype
        with torch.inference_mode(False):
            self._choice, found = add_stacks(model.blocks, num_slots, max_rank, dtype)
        self.linears = {f"blocks.{path}": linear for path, linear in found.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all places."""
        stacks = [linear.stack for linear in self.linears.values()]
        return sum(stack.down_AQD.nbytes + stack.up_AFR.nbytes for stack in stacks)

    def put(self, slot: int, linears: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
        """Put an adapter into a slot: path -> projection -> A and scale * B. Linears that it leaves out get none."""
        for path, linear in self.linears.items():
            linear.put(slot, linears.get(path, {}))

    def choose(self, slots: np.ndarray | None) -> None:
        """The next passes' tokens take these slots, `NO_ADAPTER` where a token takes none; None: no token has one."""
        if slots is None or not (slots != NO_ADAPTER).any():
            self._choice.tokens = None
        else:
            self._choice.tokens = token_adapters(slots, self.num_slots, self.device, invariant=self.invariant)

    def choose_on_device(self, adapter_T: Tensor) -> None:
        """The same for a pass that is recorded: the slots are read from this tensor whenever it is replayed."""
        self._choice.tokens = token_adapters_on_device(adapter_T, self.num_slots, invariant=self.invariant)

    def close(self) -> None:
        """Take the stacks away."""
        self._choice.tokens = None
        remove_stacks(self.model.blocks)


def attach(stacks: AdapterStacks, runner: NativeRunner) -> None:
    """Let the runner's passes take the adapters that their batches name. Other passes over the model take none."""

    def choose(batch: StepBatch) -> None:
        if batch.token_adapters is None and batch.adapter_T is not None:
            stacks.choose_on_device(batch.adapter_T)  # a pass that is recorded
        else:
            stacks.choose(batch.token_adapters)

    runner.before_pass.append(choose)
    runner.after_pass.append(lambda: stacks.choose(None))
