"""Adapters as files, in the form a stack takes them: PEFT directories, training runs, and their checkpoints.

directory with adapter_config.json      PEFT's format
run directory                           its outcome, or else its newest checkpoint that is whole
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tunesmith.checkpoint.adapter import BaseRecord, is_same_base, read_adapter_tensors
from tunesmith.checkpoint.adapter_config import CONFIG, options_for, read_adapter_config
from tunesmith.checkpoint.fingerprint import base_fingerprint
from tunesmith.checkpoint.generations import step_of
from tunesmith.checkpoint.names import module_name
from tunesmith.checkpoint.source import resolve_model
from tunesmith.checkpoint.state import list_states, load_state
from tunesmith.errors import AdapterError, CheckpointError, nearest
from tunesmith.model.lora import AdapterOptions
from tunesmith.model.multi_lora import MultiLoraLinear
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.layout import RunDir, is_run, open_run

_log = logging.getLogger(__name__)
_DOWN, _UP = "lora_A.weight", "lora_B.weight"
_MAGNITUDE = "lora_magnitude_vector"
_OUTCOME = 0.5
"""Of how many steps a run's outcome is newer than its last checkpoint."""


@dataclass(frozen=True)
class AdapterFiles:
    """What was read. linears: path -> projection -> A [r, D] and scale * B [F, r], of the whole linear, in float32.

    step: of the training state that it was, a half more for a run's outcome; None for a directory that is no run's.
    """

    source: str
    linears: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
    step: float | None = None


@dataclass(frozen=True)
class Base:
    """The base that adapters are put on. directory: None where it is not known, and nothing is compared.

    random_seed: its weights were drawn with this seed, so that no checkpoint is the base.
    """

    directory: Path | None = None
    random_seed: int | None = None


class AdapterReader:
    """Reads adapters for the linears of one model, and refuses those that do not fit it."""

    def __init__(self, linears: Mapping[str, MultiLoraLinear], family: str, max_rank: int, base: Base) -> None:
        self.linears = linears
        self.max_rank = max_rank
        self.base = base
        self._places = {
            module_name(family, path, part): (path, part) for path, linear in linears.items() for part in linear.parts
        }
        self._is_own_base: dict[str, bool] = {}

    def read(self, directory: Path) -> AdapterFiles:
        """The adapter of a directory: PEFT's format, or a run's newest. Raises: AdapterError, CheckpointError."""
        if is_run(directory):
            found = self.newest(directory)
            if found is None:
                raise AdapterError(
                    f"the run {directory} has no checkpoint yet: let it go on, or load it with follow=True, which waits"
                )
            return found
        return self._read_peft(directory)

    def newest(self, run_directory: Path, newer_than: float = -1) -> AdapterFiles | None:
        """What a run has learnt last: its outcome, or the newest checkpoint that is whole. None where none is newer.

        A checkpoint that is torn, or dropped by its run meanwhile, is passed over.
        """
        run = open_run(run_directory)
        states = [(step_of(state) or 0, state) for state in reversed(list_states(run.checkpoints))]
        if (run.final / CONFIG).is_file() and run.info().status == "finished":
            step = (states[0][0] if states else 0) + _OUTCOME
            return None if step <= newer_than else replace(self._read_peft(run.final), step=step)
        for step, state in states:
            if step <= newer_than:
                return None
            try:
                return self._read_state(run, state)
            except (CheckpointError, FileNotFoundError) as error:
                _log.warning("%s: the adapter stays at the checkpoint before it", error)
        return None

    def _read_peft(self, directory: Path) -> AdapterFiles:
        config = read_adapter_config(directory)
        if config.get("use_dora"):
            raise _refused_dora(directory)
        tensors, record = read_adapter_tensors(directory)
        self._check_base(record, directory, str(config.get("base_model_name_or_path")))
        linears: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for module in self._modules(tensors, directory):
            path, part = self._places[module]
            pair = tensors.get(f"{module}.{_DOWN}"), tensors.get(f"{module}.{_UP}")
            options = options_for(config, module)
            linears.setdefault(path, {})[part] = self._checked(pair, options, path, part, directory)
        return AdapterFiles(str(directory), linears)

    def _modules(self, tensors: Mapping[str, Tensor], directory: Path) -> list[str]:
        """The modules that the file has adapters for."""
        wanted: dict[str, None] = {}
        for name in tensors:
            suffix = next((suffix for suffix in (_DOWN, _UP) if name.endswith(f".{suffix}")), None)
            if suffix is None:
                if name.endswith(_MAGNITUDE):
                    raise _refused_dora(directory)
                raise AdapterError(f"the adapter in {directory} holds {name!r}, which is no part of a LoRA adapter")
            module = name.removesuffix(f".{suffix}")
            if module not in self._places:
                raise AdapterError(
                    f"the adapter in {directory} is for {module!r}, which this model does not have"
                    f"{nearest(module, self._places)}"
                )
            wanted[module] = None
        if not wanted:
            raise AdapterError(f"the adapter in {directory} holds no tensor")
        return list(wanted)

    def _read_state(self, run: RunDir, path: Path) -> AdapterFiles:
        """The adapters of a training state, whose logical names are ours."""
        recipe = load_recipe(run.recipe)
        options = self._options_of(recipe, run)
        state = load_state(path)
        linears: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for linear_path, linear in self.linears.items():
            for part in linear.parts:
                name = f"model.{linear_path}.adapters.{part}"
                if f"{name}.A" in state.stored:
                    pair = state.stored[f"{name}.A"], state.stored[f"{name}.B"]
                    found = linears.setdefault(linear_path, {})
                    found[part] = self._checked(pair, options, linear_path, part, path)
        if not linears:
            raise AdapterError(f"{path} holds no adapter for this model: it trained another one")
        return AdapterFiles(str(path), linears, state.step)

    def _options_of(self, recipe: Recipe, run: RunDir) -> AdapterOptions:
        """What a run's adapters are made of. Raises: AdapterError where they can't be served beside others."""
        method = recipe.method
        if method.kind not in ("lora", "qlora"):
            raise AdapterError(
                f"the run {run.path} trains the whole model (method.kind {method.kind}), not an adapter: serve the run "
                f"itself as the model"
            )
        if method.dora:
            raise _refused_dora(run.path)
        seed = recipe.train.seed if recipe.model.weights == "random" else None
        folder = resolve_model(recipe.model.path, recipe.model.revision)
        self._check_same(folder, seed, run.path)
        return AdapterOptions(method.rank, method.alpha, 0.0, method.rslora)

    def _check_same(self, folder: Path, random_seed: int | None, run: Path) -> None:
        """Whether a run was trained on this base. Looked at once: fingerprints read files."""
        own, key = self.base, f"{folder} {random_seed}"
        if own.directory is None:
            return
        if key not in self._is_own_base:
            same_seed = random_seed == own.random_seed
            same = folder.resolve() == own.directory.resolve() and same_seed
            if not same and random_seed is None and own.random_seed is None:
                same = base_fingerprint(folder) == base_fingerprint(own.directory)
            self._is_own_base[key] = same
        if not self._is_own_base[key]:
            raise _other_base(run, own.directory, str(folder))

    def _check_base(self, record: BaseRecord, directory: Path, named: str) -> None:
        base = self.base
        if base.directory is not None and is_same_base(record, base.directory, base.random_seed) is False:
            raise _other_base(directory, base.directory, named)

    def _checked(
        self,
        pair: tuple[Tensor | None, Tensor | None],
        options: AdapterOptions,
        path: str,
        part: str,
        where: Path,
    ) -> tuple[Tensor, Tensor]:
        """A and scale * B, of the shapes that the linear and the rank ask for."""
        down, up = pair
        if options.rank > self.max_rank:
            raise AdapterError(
                f"the adapter in {where} has rank {options.rank}, and places for adapters of rank {self.max_rank} at "
                f"most were made: set max_lora_rank to {options.rank} (--max-lora-rank {options.rank})"
            )
        expected = self.linears[path].whole_shapes(part, options.rank)
        for kind, tensor, shape in zip("AB", (down, up), expected, strict=True):
            got = None if tensor is None else tuple(tensor.shape)
            if got != shape:
                raise AdapterError(
                    f"the adapter in {where} has {kind} of {path}.{part} of shape {got}; its rank {options.rank} and "
                    f"this model ask for {shape}"
                )
        assert down is not None and up is not None
        return down.float(), up.float() * options.scale


def _refused_dora(where: Path) -> AdapterError:
    return AdapterError(
        f"the adapter in {where} is a DoRA adapter, which rescales the rows of the base itself, so that it can't be "
        f"served beside others: fold it into its base with: tunesmith merge {where} --output DIR, and serve that"
    )


def _other_base(adapter: Path, base: Path, named: str) -> AdapterError:
    return AdapterError(
        f"the adapter in {adapter} was trained on another base than {base} (their weights differ): serve the base it "
        f"was trained on ({named}), or fold it into this one with: tunesmith merge {adapter} "
        f"--base {base} --force --output DIR"
    )
