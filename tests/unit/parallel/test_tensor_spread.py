"""Tensor-parallel teams side by side, each with its packs, must update as one process with all packs does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.parallel.apply import spread_out, strategy_of
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.parallel.spread import Alone, Spread
from tunesmith.parallel.tensor import own_targets, shard_tensors
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.train.losses import cross_entropy_sum, head_of, trained_positions


def _neighbour(name: str) -> Any:
    """Another test file of this folder."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


STEPS = 4
Batch = tuple[Any, Tensor]


def _train(family: str, method: str, spread_of: Callable[[Any], Spread], mesh: Mesh | None) -> dict[str, Any]:
    """Losses, norms and final weights of some steps on two packs each."""
    tools = _neighbour("test_tensor")
    decoder = tools.make_decoder(family, method)
    decoder.is_fused = mesh is not None and method in ("dora", "full")
    if mesh is not None:
        shard_tensors(decoder, mesh)
    spread = spread_of(decoder)
    pieces = spread.pieces()
    optimizer = torch.optim.AdamW([piece.local for piece in pieces], lr=1e-3, eps=1e-4)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        pack, targets = batch
        index, wanted = trained_positions(targets)
        count = index.numel()
        if mesh is not None:
            index, wanted = own_targets(index, wanted, targets.numel(), mesh)
        return cross_entropy_sum(model.hidden(pack), index, wanted, head_of(model), 16), count  # type: ignore

    out: dict[str, Any] = {"losses": [], "norms": [], "counts": []}
    for step in range(STEPS):
        packs = [tools.make_pack(2 * step + k, (7, 10 + k, 4)) for k in range(2)]
        own = packs if mesh is None else packs[mesh.index("dp") :: mesh.size("dp")]
        spread.clear()
        losses, counts = spread.backward(loss, own, 1 / 40)
        spread.collect()
        out["losses"].append(spread.total(torch.stack(losses).sum()).item())
        out["counts"].append(spread.count(sum(counts)))
        out["norms"].append(spread.norm([piece.local for piece in pieces]).item())
        optimizer.step()
    out["weights"] = {p.name: (p.shape, p.boxes, p.local.detach().clone(), p.is_own) for p in pieces}
    return out


def _teams(family: str, method: str, strategy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = ParallelSection.model_validate({"tensor": 2, "strategy": strategy})
    with joined(settings, "cpu") as mesh:

        def spread_of(decoder: Any) -> Spread:
            spread = spread_out(decoder, mesh, settings)
            assert strategy_of(spread) == strategy
            return spread

        return _train(family, method, spread_of, mesh), _train(family, method, Alone, None)


@pytest.mark.parametrize(
    ("family", "method", "strategy"),
    [("llama", "full", "zero3"), ("qwen3", "full", "ddp"), ("qwen2", "dora", "zero3"), ("mistral", "qlora", "zero1")],
)
def test_two_teams_of_two_train_as_one_process(
    ranks: Callable[..., list[Any]], family: str, method: str, strategy: str
) -> None:
    results = ranks(_teams, 4, family, method, strategy)
    alone = results[0][1]
    for got, _ in results:
        for key in ("losses", "norms", "counts"):
            assert got[key] == pytest.approx(alone[key], rel=1e-5)
    for name, (shape, _, expected, _) in alone["weights"].items():
        whole, times_written = torch.full(shape, torch.nan), torch.zeros(shape)
        for got, _ in results:
            if name in got["weights"]:
                its_shape, boxes, values, is_own = got["weights"][name]
                assert its_shape == shape
                for here, there in boxes:
                    held, place = (tuple(slice(*span) for span in box) for box in (here, there))
                    whole[place] = values[held]
                    times_written[place] += is_own
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(times_written, torch.ones(shape)), name
