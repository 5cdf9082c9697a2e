"""Which kernel attends over pages: ours, or another library's where it is installed, fits and was measured faster.

    installed? --fits these heads?--> right and faster? (measured once, then kept in ~/.cache/tunesmith/attention)
                                                 |
    a step --the measured shape it is most like--+--> the fastest kernel that can take this step, else ours

Nothing is imported, and nothing measured, where neither FlashAttention-3 nor FlashInfer is installed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.engine.attention_shapes import AttentionShape, nearest, shapes_for
from tunesmith.engine.attention_timing import OURS, DeviceTimer, Measured, Timer, compare
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.pages import PAGE_SLOTS
from tunesmith.errors import RequestError, RunDirError
from tunesmith.hardware import driver_version
from tunesmith.kernels import flash_attention_3, flashinfer_attention
from tunesmith.kernels import paged_attention as own
from tunesmith.kernels.chip import chip_of
from tunesmith.kernels.paged_step import PagedHeads, PagedKernel, PagedStep
from tunesmith.rundir.cache import user_cache
from tunesmith.rundir.io import read_json, write_json_atomic

log = logging.getLogger(__name__)
FASTER = 0.98
"""Of our time: what is not clearly faster is not taken."""
_PACKAGES: dict[str, tuple[Callable[[], bool], Callable[[], PagedKernel], str]] = {
    flash_attention_3.NAME: (
        flash_attention_3.is_installed,
        flash_attention_3.FlashAttention3,
        "FlashAttention-3 (the package flash_attn_3, for Hopper)",
    ),
    flashinfer_attention.NAME: (
        flashinfer_attention.is_installed,
        flashinfer_attention.FlashInferAttention,
        "FlashInfer (pip install flashinfer-python)",
    ),
}


class AttentionKernels:
    """Other libraries' kernels in the order of their speed for each shape.

    ranked: of each measured shape, the kernels that are faster than ours, fastest first.
    asked: the one that was chosen by hand: its failures are the caller's.
    """

    def __init__(
        self,
        kernels: Mapping[str, PagedKernel],
        ranked: Mapping[AttentionShape, Sequence[str]],
        *,
        asked: str | None = None,
        measured: Measured | None = None,
        stored: Path | None = None,
    ) -> None:
        self.kernels = dict(kernels)
        self.ranked = {shape: list(names) for shape, names in ranked.items()}
        self.asked = asked
        self.measured = measured or Measured()
        self.stored = stored
        self._shapes = list(self.ranked)

    def attend(
        self,
        query_TNH: Tensor,
        keys_PSKH: Tensor,
        values_PSKH: Tensor,
        step: PagedStep,
        *,
        window: int | None,
        out: Tensor | None,
    ) -> Tensor | None:
        """out_TNH by the fastest kernel that serves this step; None: ours is to be taken."""
        name = self.name_of(step)
        if name is None:
            return None
        options: dict[str, Any] = {"window": window, "scale": query_TNH.shape[-1] ** -0.5, "out": out}
        try:
            return self.kernels[name](query_TNH, keys_PSKH, values_PSKH, step, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign library raises
            if self.asked is not None or _is_recording(query_TNH.device):
                raise
            self._leave_out(name, f"{type(error).__name__}: {error}")
        return self.attend(query_TNH, keys_PSKH, values_PSKH, step, window=window, out=out)

    def name_of(self, step: PagedStep) -> str | None:
        """The kernel of a step; None: ours."""
        if not self.kernels or not self._shapes:
            return None
        known = step.plans.get("kernels")
        if known is None:
            known = step.plans["kernels"] = self.ranked[nearest(step, self._shapes)]
        return next((name for name in known if self.kernels[name].serves(step)), None)

    def _leave_out(self, name: str, reason: str) -> None:
        """Take it no more in this process."""
        log.warning("%s is left out, since it failed: %s", name, reason)
        self.measured.dropped[name] = reason
        for names in self.ranked.values():
            if name in names:
                names.remove(name)

    @property
    def takes_prompts(self) -> bool:
        """Whether steps that do more than decode have another kernel than ours."""
        return any(names for shape, names in self.ranked.items() if shape.kind != "decode")

    def facts(self) -> dict[str, Any]:
        """For people and JSON: versions, the kernel of each shape, milliseconds over all layers, what was dropped.

        chosen: in steps that are launched one by one; recorded: in decoding steps that are CUDA graphs.
        """
        return {
            "packages": {name: kernel.version for name, kernel in self.kernels.items()},
            "asked": self.asked,
            "chosen": {shape.label: (names or [OURS])[0] for shape, names in self.ranked.items()},
            "recorded": {
                shape.label: next((name for name in names if self.kernels[name].records), OURS)
                for shape, names in self.ranked.items()
                if shape.kind == "decode"
            },
            "milliseconds": self.measured.milliseconds,
            "dropped": self.measured.dropped,
            "stored": None if self.stored is None else str(self.stored),
        }

    def line(self) -> str:
        """What was chosen, in one line."""
        chosen: dict[str, list[str]] = {}
        facts = self.facts()
        for label, name in facts["chosen"].items():
            recorded = facts["recorded"].get(label, name)
            chosen.setdefault(name if recorded == name else f"{name} ({recorded} where recorded)", []).append(label)
        return "; ".join(f"{name}: {', '.join(labels)}" for name, labels in chosen.items())


def heads_of(
    model: ModelConfig, dtype: torch.dtype, page_dtype: torch.dtype, device: torch.device, is_shared: bool
) -> PagedHeads | None:
    """What a model's attention asks of a kernel; None where there is no GPU."""
    if device.type != "cuda":
        return None
    chip = chip_of(device)
    assert chip is not None
    return PagedHeads(
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        dtype,
        page_dtype,
        PAGE_SLOTS,
        tuple(model.window(layer) for layer in range(model.num_hidden_layers)),
        chip.capability,
        is_shared,
    )


def attention_facts(runner: Any) -> dict[str, Any] | None:
    """What a runner's attention over pages is done by; None where it is ours alone."""
    found = getattr(runner, "attention", None)
    return found.facts() if isinstance(found, AttentionKernels) else None


def check_backend(asked: str) -> None:
    """Raises RequestError where a kernel that was asked for is not installed."""
    if asked in _PACKAGES and not _PACKAGES[asked][0]():
        raise RequestError(
            f"attention_backend={asked!r} wants {_PACKAGES[asked][2]}, which is not installed: install it, or take "
            f"attention_backend='auto'"
        )


def find_kernels(
    config: EngineConfig,
    heads: PagedHeads | None,
    device: torch.device,
    *,
    measures: bool = True,
    timer: Timer | None = None,
) -> AttentionKernels | None:
    """The kernels for an engine, measured or as they were stored; None: ours alone.

    heads: None where there is no GPU. measures: False where nothing may be measured (a model that somebody else holds).
    Raises: RequestError where a kernel that was asked for by name is not installed, does not fit, or is wrong.
    """
    asked = config.attention_backend
    if heads is None and asked != "auto":
        raise RequestError(f"attention_backend={asked!r} wants a GPU: leave it out")
    if asked == OURS or (asked == "auto" and (heads is None or config.batch_invariant or not measures)):
        return None
    installed = [name for name, (is_there, _, _) in _PACKAGES.items() if asked in ("auto", name) and is_there()]
    if asked == "auto" and (not installed or torch.are_deterministic_algorithms_enabled()):
        return None
    assert heads is not None
    if asked == "auto":
        return _measured(config, heads, device, installed, timer)
    return _asked(config, heads, device, asked)


def _asked(config: EngineConfig, heads: PagedHeads, device: torch.device, asked: str) -> AttentionKernels:
    """One kernel for all that it serves, once its results were found to be right."""
    check_backend(asked)
    if config.batch_invariant:
        raise RequestError(
            f"attention_backend={asked!r} rounds as the batch is cut, so it does not go with batch_invariant: leave "
            f"one of them out"
        )
    kernel = _loaded(asked)
    reason = kernel if isinstance(kernel, str) else kernel.refused(heads)
    shapes = shapes_for(config)
    if reason is None:
        assert not isinstance(kernel, str)
        measured = compare({asked: kernel}, heads, shapes, device)
        reason = measured.dropped.get(asked)
    if reason is not None or isinstance(kernel, str):
        raise RequestError(f"attention_backend={asked!r} can't be had here: {reason}; take attention_backend='auto'")
    chosen = AttentionKernels({asked: kernel}, {shape: [asked] for shape in shapes}, asked=asked)
    log.info("attention over pages, as asked: %s", chosen.line())
    return chosen


def _measured(
    config: EngineConfig, heads: PagedHeads, device: torch.device, installed: Sequence[str], timer: Timer | None
) -> AttentionKernels | None:
    """What fits of the installed ones, ranked by what was measured here now, or before."""
    kernels, refused = {}, {}
    for name in installed:
        kernel = _loaded(name)
        reason = kernel if isinstance(kernel, str) else kernel.refused(heads)
        if reason is not None or isinstance(kernel, str):
            refused[name] = str(reason)
            log.info("%s is installed and not used: %s", name, reason)
        else:
            kernels[name] = kernel
    if not kernels:
        return None
    shapes = shapes_for(config)
    key = _key(kernels, heads, shapes, device)
    path = cache_folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]}.json"
    measured = _read(path, key)
    if measured is None:
        measured = _measure(kernels, heads, shapes, device, timer)
        if measured is None:
            return None
        _write(path, key, measured)
    for name, reason in measured.dropped.items():
        log.warning("%s is not used for attention: %s", name, reason)
    ranked = {shape: ranking(measured.milliseconds.get(shape.label, {})) for shape in shapes}
    measured.dropped |= refused
    chosen = AttentionKernels(kernels, ranked, measured=measured, stored=path)
    log.info("attention over pages: %s", chosen.line())
    return chosen


def _measure(
    kernels: Mapping[str, PagedKernel],
    heads: PagedHeads,
    shapes: Sequence[AttentionShape],
    device: torch.device,
    timer: Timer | None,
) -> Measured | None:
    """None where memory is too short to measure."""
    started = time.perf_counter()
    log.info("measuring %s beside our own attention, once on this machine (it may compile first)", ", ".join(kernels))
    try:
        measured = compare(kernels, heads, shapes, device, timer or DeviceTimer(device))
    except torch.OutOfMemoryError:
        log.warning("too little memory to measure %s: our own attention is used", ", ".join(kernels))
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    log.info("measured in %.1f s", time.perf_counter() - started)
    return measured


def ranking(milliseconds: Mapping[str, float]) -> list[str]:
    """The kernels that are clearly faster than ours, fastest first."""
    ours = milliseconds.get(OURS)
    others = [name for name, took in milliseconds.items() if ours is not None and took < FASTER * ours]
    return sorted((name for name in others if name != OURS), key=lambda name: milliseconds[name])


def _loaded(name: str) -> PagedKernel | str:
    """The kernel, or why its package can't be imported."""
    try:
        return _PACKAGES[name][1]()
    except Exception as error:  # whatever a foreign package raises as it is imported
        log.debug("%s can't be imported", name, exc_info=True)
        return f"its package can't be imported: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _key(
    kernels: Mapping[str, PagedKernel], heads: PagedHeads, shapes: Sequence[AttentionShape], device: torch.device
) -> dict[str, Any]:
    """All that decides which kernel is fastest."""
    return {
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": driver_version(),
        "torch": torch.__version__,
        "packages": {name: kernel.version for name, kernel in kernels.items()},
        "ours": _own_kernels(),
        "heads": [heads.num_heads, heads.num_kv_heads, heads.head_dim],
        "dtypes": [str(heads.dtype), str(heads.page_dtype)],
        "page_slots": heads.page_slots,
        "windows": list(heads.windows),
        "shapes": [shape.label for shape in shapes],
    }


def _own_kernels() -> str:
    """What changes where our own kernels do."""
    folder = Path(own.__file__).parent
    content = [path.read_bytes() for path in sorted(folder.glob("paged_attention*.py"))]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]


def cache_folder() -> Path:
    """Where choices are kept: $XDG_CACHE_HOME, or ~/.cache."""
    return user_cache("attention")


def _read(path: Path, key: Mapping[str, Any]) -> Measured | None:
    try:
        raw = read_json(path)
        return Measured(raw["milliseconds"], raw["dropped"]) if raw["key"] == key else None
    except (RunDirError, OSError, KeyError, TypeError):
        return None


def _write(path: Path, key: Mapping[str, Any], measured: Measured) -> None:
    """Keep it; a folder that can't be written is no reason to stop."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"key": key, "milliseconds": measured.milliseconds, "dropped": measured.dropped})
    except OSError as error:
        log.info("the choice can't be kept in %s: %s", path.parent, error)


def _is_recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
