"""What the host does before a step's first kernel: no walk over the modules, whose time grows with their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.model.decoder import Decoder
from tunesmith.model.packed import PackedTokens, pack_documents
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.session import Session, build_session

Make = Callable[..., Path]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a tree of modules is walked, by torch's own generators."""
    count: Counter[str] = Counter()
    for name in ("named_modules", "named_children", "_named_members"):
        original = getattr(nn.Module, name)

        def counted(
            self: nn.Module, *args: Any, name: str = name, original: Any = original, **kwargs: Any
        ) -> Iterator[Any]:
            count[name] += 1
            return iter(original(self, *args, **kwargs))

        monkeypatch.setattr(nn.Module, name, counted)
    return count


@pytest.fixture
def session(tiny_model_dir: Make, tmp_path: Path) -> Iterator[Session]:
    recipe = recipe_from_mapping(
        {
            "model": {"path": str(tiny_model_dir("llama")), "device": "cpu"},
            "method": {"kind": "lora", "rank": 4},
            "data": {"format": "tokens", "max_length": 16, "max_rows": 32, "validation_fraction": 0},
            "train": {"micro_batch_tokens": 32, "accumulation": 2, "max_steps": 4, "learning_rate": 1e-3},
            "output": str(tmp_path),
        }
    )
    made = build_session(recipe)
    yield made
    made.close()


def test_a_step_walks_no_modules(session: Session, walks: Counter[str]) -> None:
    session.step()
    assert walks  # the first step looks at everything once, and so the counter works
    walks.clear()
    session.step()
    assert not walks
    session.model.eval()
    session.step()
    assert session.model.training and all(child.training for child in session.module.modules())


class _Captured:
    """Graphs that only run what they would record, and remember what they were given."""

    def __init__(self) -> None:
        self.given: list[tuple[object, list[nn.Parameter]]] = []
        self._blocks: object = None

    def belong_to(self, blocks: object) -> None:
        self._blocks = blocks

    def __call__(
        self, run: Any, hidden: Tensor, pack: PackedTokens, kind: str, parameters: list[nn.Parameter], seed: Any
    ) -> Tensor:
        self.given.append((self._blocks, list(parameters)))
        out: Tensor = run(hidden, pack, seed)
        return out


@pytest.fixture
def captured(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Captured]:
    """The session's blocks go the way of a GPU's graphs."""
    fake = _Captured()
    assert isinstance(session.model, Decoder)
    session.model.captured = fake  # type: ignore[assignment]
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.dtype == torch.int64))
    yield fake


def test_a_pass_by_graphs_walks_no_modules(session: Session, captured: _Captured, walks: Counter[str]) -> None:
    pack = pack_documents([[1, 2, 3], [4, 5]])
    assert isinstance(session.model, Decoder)
    session.model.train()
    session.model.hidden(pack)
    walks.clear()
    session.model.hidden(pack)
    assert not walks
    (first, trained), (second, again) = captured.given
    assert first is second
    expected = [p for p in session.model.blocks.parameters() if p.requires_grad]
    for found in (trained, again):
        assert len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))


def test_what_changed_between_two_passes_is_seen(session: Session, captured: _Captured) -> None:
    pack = pack_documents([[1, 2, 3], [4, 5]])
    session.model.train()
    session.model.hidden(pack)
    assert isinstance(session.model, Decoder)
    attention: Any = session.model.blocks[0].attention
    frozen = next(p for p in attention.qkv.adapters.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    session.model.hidden(pack)
    attention.qkv = attention.qkv.base  # as a method that puts other linears in place does
    session.model.hidden(pack)
    (first, all_trained), (second, fewer), (third, without) = captured.given
    assert first is second and second is not third
    assert len(fewer) == len(all_trained) - 1
    assert len(without) < len(fewer)
