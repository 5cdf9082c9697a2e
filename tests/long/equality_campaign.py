"""Twenty steps of every way to spread training over CPU ranks, beside one process on the same batches.

    python tests/long/equality_campaign.py --out equality.json [--only tp4]

Every strategy and product of the native engine and every stage of DeepSpeed, for full training, LoRA and QLoRA, on 2, 4
and (data x tensor x pipeline) 8 gloo ranks, in float32. What is recorded of a case is the largest relative distance of
a step's loss, and of a gradient norm, to those of one process. Packs are ragged, and every second step is a pack short.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT / "tests"), str(ROOT)) if path not in sys.path]

STEPS, PACKS, TOKENS = 20, 4, 48
BOUND, NORM_BOUND = 1e-5, 1e-4
TIMEOUT_S = 300.0
KINDS = ("full", "lora", "qlora")
CONFIG = {
    "vocab_size": 272,
    "hidden_size": 256,  # a quarter of every matrix's columns holds whole groups of NF4's 64 values
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
Ranks = Callable[..., list[Any]]


@dataclass(frozen=True)
class Case:
    """One way to train: `ranks` processes, of which the data-parallel ones are what tensor and pipeline leave."""

    kind: str
    ranks: int = 1
    strategy: str = "auto"
    tensor: int = 1
    pipeline: int = 1
    engine: str = "native"
    offload: str = "none"

    @property
    def name(self) -> str:
        """As lora-dp2-zero1, full-dp2-tp2-pp2-ddp, qlora-deepspeed-dp4-zero3-cpu."""
        data = self.ranks // (self.tensor * self.pipeline)
        sizes = [f"{axis}{n}" for axis, n in (("dp", data), ("tp", self.tensor), ("pp", self.pipeline)) if n > 1]
        engine = [] if self.engine == "native" else [self.engine]
        return "-".join([self.kind, *engine, *sizes, *(x for x in (self.strategy, self.offload) if x not in _DEFAULTS)])


_DEFAULTS = ("auto", "none")


def cases() -> Iterator[Case]:
    """All of them: the native engine's strategies, its other dimensions, their products; then DeepSpeed."""
    for kind in KINDS:
        for ranks, strategy in product((2, 4), ("ddp", "zero1", "zero2", "zero3")):
            yield Case(kind, ranks, strategy)
        for count in (2, 4):
            yield Case(kind, count, tensor=count)
            yield Case(kind, count, pipeline=count)
        for strategy in ("ddp", "zero1", "zero2", "zero3"):
            yield Case(kind, 4, strategy, tensor=2)
        yield Case(kind, 4, tensor=2, pipeline=2)
        for strategy in ("ddp", "zero1"):
            yield Case(kind, 4, strategy, pipeline=2)
            yield Case(kind, 8, strategy, tensor=2, pipeline=2)
        for ranks, stage, offload in product((2, 4), ("zero1", "zero2", "zero3"), ("none", "cpu")):
            yield Case(kind, ranks, stage, engine="deepspeed", offload=offload)


def save_model(folder: Path) -> str:
    """A random model of CONFIG, as transformers saves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **CONFIG)).save_pretrained(folder)
    return str(folder)


def train(model_dir: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of the steps of a case, in one of its processes; the seconds of CPU that took."""
    from tunesmith.parallel.mesh import joined
    from tunesmith.recipe.parallel import ParallelSection

    case, began = Case(**facts), time.process_time()
    settings = ParallelSection(
        strategy=case.strategy,  # type: ignore[arg-type]
        engine=case.engine,  # type: ignore[arg-type]
        offload=case.offload,  # type: ignore[arg-type]
        tensor=case.tensor,
        pipeline=case.pipeline,
    )
    with joined(settings, "cpu") as mesh:
        updater = _updater(model_dir, case, settings, mesh)
        try:
            done = [_step(updater, number, mesh) for number in range(STEPS)]
        finally:
            if case.engine == "deepspeed":
                updater.close()
    cpu_s = time.process_time() - began
    return {"losses": [update.loss for update in done], "norms": [update.grad_norm for update in done], "cpu_s": cpu_s}


def _updater(model_dir: str, case: Case, settings: Any, mesh: Any) -> Any:
    from tunesmith.checkpoint.load import load_decoder
    from tunesmith.model.methods import apply_method
    from tunesmith.parallel.apply import spread_out
    from tunesmith.parallel.tensor import shard_tensors
    from tunesmith.recipe.schema import MethodSection, TrainSection
    from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_config
    from tunesmith.train.update import Updater

    method = MethodSection(kind="full") if case.kind == "full" else MethodSection(kind=case.kind, rank=4)  # type: ignore[arg-type]
    recipe = TrainSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, precision="float32")
    model = load_decoder(Path(model_dir), quantize=method.quantisation)
    apply_method(model, method, seed=0)
    shard_tensors(model, mesh)
    model.is_fused = True
    model.train()
    if case.engine == "deepspeed":
        config = deepspeed_config(settings, recipe, model, STEPS, mesh, micro_batches=PACKS // case.ranks)
        return DeepSpeedUpdater(model, recipe, STEPS, config, mesh)
    return Updater(model, recipe, STEPS, spread_out(model, mesh, settings))


def _step(updater: Any, number: int, mesh: Any) -> Any:
    from tunesmith.parallel.tensor import own_targets
    from tunesmith.train.session import language_model_loss

    def loss(module: Any, batch: Any) -> Any:
        """Of this process's own tokens, where several share a pack."""
        index, targets = own_targets(batch.index, batch.targets, batch.pack.tokens_T.numel(), mesh)
        value, _ = language_model_loss(module, replace(batch, index=index, targets=targets), 64)
        return value, batch.num_trained

    window = _window(number, mesh.index("dp"), mesh.size("dp"))
    denominator = sum(batch.num_trained for batch in _window(number, 0, 1))
    return updater.step(number, window, loss, denominator=denominator, describe=lambda batch: "a batch")


def _window(step: int, rank: int, ranks: int) -> list[Any]:
    """This rank's packs of a step, of two documents of 12 to 24 tokens; whoever has a pack less trains an empty one."""
    from tunesmith.recipe.schema import DataSection
    from tunesmith.train.batches import build_micro_batch

    first = 2 * PACKS * step
    packs = [(first + 2 * i, first + 2 * i + 1) for i in range(PACKS - step % 2)]
    mine: list[tuple[int, ...]] = list(packs[rank::ranks])
    mine += [()] * (-(-len(packs) // ranks) - len(mine))
    data = DataSection(format="tokens", max_length=24)
    return [build_micro_batch(_documents(), pack, TOKENS, data, 272) for pack in mine]


def _documents() -> Any:
    """Random documents, cut to lengths of 12 to 24 tokens."""
    from tunesmith.train.batches import RandomTokens

    class Ragged(RandomTokens):
        def arrays(self, index: int) -> Any:
            return tuple(values[: self.lengths[index]] for values in super().arrays(index))

    documents = Ragged(2 * PACKS * STEPS, 24, 272, seed=3)
    documents.lengths = 12 + np.arange(len(documents)) * 5 % 13
    return documents


def compare(ranks: Ranks, model_dir: str, case: Case, alone: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a case. Of its ranks the worst counts."""
    began = time.monotonic()
    outcomes = ranks(train, case.ranks, model_dir, asdict(case), timeout_s=TIMEOUT_S)
    worst = {what: max(_distance(each[what], alone[what]) for each in outcomes) for what in ("losses", "norms")}
    return {
        "name": case.name,
        **asdict(case),
        "steps": STEPS,
        "loss_relative_distance": worst["losses"],
        "norm_relative_distance": worst["norms"],
        "is_equal": worst["losses"] <= BOUND and worst["norms"] <= NORM_BOUND,
        "last_loss": outcomes[0]["losses"][-1],
        "cpu_s": round(sum(each["cpu_s"] for each in outcomes), 2),
        "duration_s": round(time.monotonic() - began, 2),
    }


def _distance(got: list[float], expected: list[float]) -> float:
    assert len(got) == len(expected) == STEPS
    ours, theirs = np.array(got), np.array(expected)
    worst = np.abs(ours - theirs) / np.abs(theirs)
    return float(worst.max()) if np.isfinite(worst).all() else float("inf")


def run_campaign(
    ranks: Ranks, model_dir: str, chosen: Iterable[Case], alone: dict[str, Any], done: Callable[[dict[str, Any]], None]
) -> None:
    """Each case beside one process, which trains once for every kind and is kept in `alone`; `done` gets what is
    recorded of it."""
    for case in chosen:
        if case.kind not in alone:
            (alone[case.kind],) = ranks(train, 1, model_dir, asdict(Case(case.kind)), timeout_s=TIMEOUT_S)
        try:
            done(compare(ranks, model_dir, case, alone[case.kind]))
        except AssertionError as error:  # of the pool: a rank failed
            done({"name": case.name, **asdict(case), "is_equal": False, "error": str(error)[-2000:]})


def main() -> int:
    """Exit code 1 when a case differs."""
    from ranks import RankPool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; one that exists is gone on with")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    asked = parser.parse_args()
    record, alone = _Record(asked.out, asked.only), dict[str, Any]()
    names = {result["name"] for result in record.results}
    left = [case for case in cases() if asked.only in case.name and case.name not in names]
    chosen = sorted(left, key=lambda case: (case.engine, case.ranks))
    with tempfile.TemporaryDirectory() as folder:
        model_dir = save_model(Path(folder))
        pool = RankPool()
        run_campaign(pool, model_dir, chosen, alone, record.add)
        pool.close()
    return int(not all(result["is_equal"] for result in record.results))


class _Record:
    """The JSON file, written after every case."""

    def __init__(self, path: Path, only: str) -> None:
        from tunesmith.rundir.environment import environment_fingerprint, git_commit
        from tunesmith.rundir.io import read_json

        self.path, self.commit = path, (git_commit() or {}).get("commit")
        self.results: list[dict[str, Any]] = read_json(path)["cases"] if path.exists() else []
        chosen = f" --only {only}" if only else ""
        self.command = f"python tests/long/equality_campaign.py --out {path.name}{chosen}"
        self.environment = environment_fingerprint()

    def add(self, result: dict[str, Any]) -> None:
        """A case more."""
        from tunesmith.rundir.io import write_json_atomic

        self.results.append({**result, "commit": self.commit})
        print(f"{result['name']}: {result.get('loss_relative_distance', 'failed')}", flush=True)
        distances = [each.get("loss_relative_distance") for each in self.results]
        facts = {
            "schema": "tunesmith.equality",
            "schema_version": 1,
            "command": self.command,
            "bound": {"loss": BOUND, "norm": NORM_BOUND},
            "counts": {"cases": len(self.results), "equal": sum(each["is_equal"] for each in self.results)},
            "largest_loss_relative_distance": max((each for each in distances if each is not None), default=None),
            "cases": self.results,
            "environment": self.environment,
        }
        write_json_atomic(self.path, facts)


if __name__ == "__main__":
    sys.exit(main())
