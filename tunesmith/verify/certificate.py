"""The certificate of a recipe: every check that applies to it, run on this machine, kept until something changes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tunesmith
from tunesmith.checkpoint.source import resolve_tokenizer
from tunesmith.errors import RunDirError
from tunesmith.hardware import describe_device
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.cache import user_cache
from tunesmith.rundir.io import read_json, write_json_atomic
from tunesmith.rundir.layout import RunDir
from tunesmith.train import randomness
from tunesmith.train.resolve import DTYPES, resolve_recipe
from tunesmith.verify.blocks import blocks_written_out
from tunesmith.verify.check import Check, Outcome, run_check
from tunesmith.verify.invariance import accumulation_invariance, packing_isolation
from tunesmith.verify.kernels import (
    compare,
    fp8_products,
    linear_cases,
    loss_case,
    model_cases,
    nf4_dequantise,
    shapes_of,
)
from tunesmith.verify.mask import mask_shown
from tunesmith.verify.quantisers import adamw8bit_update, nf4_quantiser
from tunesmith.verify.routing import routing_case
from tunesmith.verify.stations import merge_parity, resume_equality
from tunesmith.verify.subject import Subject, make_subject

SCHEMA_VERSION = 1
_FULL_CHECKS = ("merge parity", "resume equality")
MASK_SHOWN = "mask shown"
LEFT_TO_VERIFY = "left to tunesmith verify"
# Where a run is written to, and how often, changes nothing of what it computes.
_IRRELEVANT = ("name", "output", "log", "bench", "checkpoint", "evaluation")


@dataclass(frozen=True)
class Certificate:
    """The checks of a recipe on one chip with one version. skipped: check -> why it does not apply."""

    checks: tuple[Check, ...]
    skipped: Mapping[str, str]
    full: bool
    chip: str
    versions: Mapping[str, str]
    key: str
    duration_s: float
    cached: bool = False

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain data."""
        return {
            "schema": "tunesmith.certificate",
            "schema_version": SCHEMA_VERSION,
            **vars(self),
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
        }


def certify(recipe: Recipe, *, full: bool = True, run_dir: Path | None = None) -> Certificate:
    """Check that a run of `recipe` computes what it should.

    Args:
        full: also merge parity and resume equality; the rest takes a second or two on a small model.
        run_dir: a run directory, into which certificate.json is written.

    The random state of the process is left as it was. A certificate that passed is kept in the cache and taken from
    there while recipe, model, data, chip, torch and tunesmith are the same.
    Raises: whatever keeps the recipe from being run at all; a check that fails is in the certificate.
    """
    resolved = resolve_recipe(recipe)
    device = torch.device(resolved.model.device)
    subject = make_subject(resolved)
    chip, versions = describe_device(device).name, _versions()
    key = _key(resolved, subject.directory, chip, versions, full)
    certificate = _read_cached(key)
    if certificate is None:
        began = time.perf_counter()
        with _untouched(device):
            checks, skipped = _run_checks(resolved, subject, device, full)
        seconds = time.perf_counter() - began
        certificate = Certificate(checks, skipped, full, chip, versions, key, seconds)
        if certificate.passed:
            _write_cached(certificate)
    if run_dir is not None:
        write_json_atomic(RunDir(run_dir).certificate, certificate.to_dict())
    return certificate


def _run_checks(
    recipe: Recipe, subject: Subject, device: torch.device, full: bool
) -> tuple[tuple[Check, ...], dict[str, str]]:
    skipped = _skipped(recipe, subject, full)
    found = {name: check for name, check in _all_checks(recipe, subject, device) if name not in skipped}
    return tuple(run_check(name, check) for name, check in found.items()), skipped


def _all_checks(recipe: Recipe, subject: Subject, device: torch.device) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    dtype = DTYPES[recipe.train.precision]
    yield MASK_SHOWN, partial(mask_shown, recipe, resolve_tokenizer(recipe))
    yield "accumulation invariance", partial(accumulation_invariance, subject, device)
    yield "packing isolation", partial(packing_isolation, subject, device, dtype)
    yield "blocks written out", partial(blocks_written_out, subject, device)
    yield from _kernel_checks(recipe, subject, device, dtype)
    yield "merge parity", partial(merge_parity, subject, device)
    yield "resume equality", partial(resume_equality, subject)


def _kernel_checks(
    recipe: Recipe, subject: Subject, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    shapes = shapes_of(subject.widths, recipe.train, device)
    cases = [] if subject.config is None else list(model_cases(shapes, device, dtype))
    if subject.config is not None and subject.config.moe is not None:
        cases.append(routing_case(shapes, device, dtype))
    cases.append(loss_case(shapes, device, dtype, recipe.train.loss_chunk_tokens))
    if recipe.method.kind == "qlora":
        yield "kernel: NF4 quantise", partial(nf4_quantiser, shapes, recipe.method, device, dtype)
        yield "kernel: NF4 dequantise", partial(nf4_dequantise, shapes, recipe.method, device, dtype)
    if recipe.method.uses_fp8:
        yield "kernel: fp8 products", partial(fp8_products, shapes, recipe.method, device, dtype)
    if recipe.train.optimizer == "adamw8bit":
        yield "kernel: 8-bit AdamW", partial(adamw8bit_update, recipe.train, device)
    if recipe.method.kind in ("lora", "qlora"):
        cases += linear_cases(shapes, recipe.method, device, dtype)
    for case in cases:
        yield f"kernel: {case.name}", partial(compare, case)


def _skipped(recipe: Recipe, subject: Subject, full: bool) -> dict[str, str]:
    """Checks that don't apply, and why."""
    skipped = {}
    if subject.config is None:
        skipped["blocks written out"] = "the blocks are transformers' own"
    elif recipe.train.blocks == "eager":
        skipped["blocks written out"] = "train.blocks is eager"
    if recipe.method.kind not in ("lora", "qlora"):
        skipped["merge parity"] = f"{recipe.method.kind} has no adapter to merge"
    if subject.config is None:
        skipped["kernels of the blocks"] = "norms, positions and attention are transformers' own"
    return skipped if full else {**dict.fromkeys(_FULL_CHECKS, LEFT_TO_VERIFY), **skipped}


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were, and no trace in memory statistics: a run must not depend on being checked."""
    generators, facts = randomness.capture(device)
    try:
        yield
    finally:
        randomness.restore(generators, facts, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def _versions() -> dict[str, str]:
    """Of what the checks run: tunesmith, torch, and the libraries whose kernels or models a run may use."""
    others = {name: _version(name) for name in ("triton", "transformers", "tokenizers")}
    return {"tunesmith": tunesmith.__version__, "torch": torch.__version__, **others, "source": _source_state()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _source_state() -> str:
    """Changes when a file of tunesmith does: a working copy keeps its version while it is edited."""
    root = Path(tunesmith.__file__).parent
    return _digest([(str(p.relative_to(root)), *_stamp(p)) for p in sorted(root.rglob("*.py"))])


def _key(recipe: Recipe, directory: Path, chip: str, versions: Mapping[str, str], full: bool) -> str:
    content = recipe.model_dump(mode="json", exclude=set(_IRRELEVANT))
    model = [(p.name, *_stamp(p)) for p in sorted(directory.glob("*")) if p.is_file()]
    named = [*recipe.data.train, *([recipe.data.chat_template] if recipe.data.chat_template else [])]
    data = [(name, *_stamp(Path(name))) for name in named]
    return _digest([content, model, data, chip, dict(versions), full, SCHEMA_VERSION])


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a file; of a folder, its newest; zeros for what is no file here (a Hub id, a built-in)."""
    if path.is_dir():
        stamps = [_stamp(child) for child in sorted(path.rglob("*")) if child.is_file()]
        return (sum(size for size, _ in stamps), max((changed for _, changed in stamps), default=0))
    if not path.is_file():
        return (0, 0)
    status = path.stat()
    return (status.st_size, status.st_mtime_ns)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def cache_directory() -> Path:
    """Where certificates are kept: $XDG_CACHE_HOME, or ~/.cache."""
    return user_cache("certificates")


def _read_cached(key: str) -> Certificate | None:
    try:
        raw = read_json(cache_directory() / f"{key}.json")
        checks = tuple(Check(**check) for check in raw["checks"])
        names = ("skipped", "full", "chip", "versions", "key", "duration_s")
        kept = Certificate(checks, **{name: raw[name] for name in names})
    except (RunDirError, OSError, KeyError, TypeError):
        return None
    return replace(kept, cached=True) if kept.key == key and kept.passed else None


def _write_cached(certificate: Certificate) -> None:
    """Keep it; a cache that can't be written is no reason to stop."""
    path = cache_directory() / f"{certificate.key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, certificate.to_dict())
    except OSError:
        return
