"""Which recipes run wholly written out, and that those do what the eager blocks do: norms of heads, dropout, DoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.kernels.dropout import Noise, kept
from tunesmith.model import projections
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.recipe.schema import MethodSection

Make = Callable[..., Path]
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10] * 7, [3]]
SEED = 11
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "wide heads": ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora"},
    "qlora": {"kind": "qlora"},
    "k and down": {"kind": "lora", "targets": ["k_proj", "down_proj"]},
    "gate": {"kind": "lora", "targets": ["gate_proj"]},
    "dora": {"kind": "lora", "dora": True},
    "rs dora": {"kind": "lora", "dora": True, "rslora": True},
    "nf4 dora": {"kind": "qlora", "dora": True},
    "v and up dora": {"kind": "lora", "dora": True, "targets": ["v_proj", "up_proj"]},
    "freeze": {"kind": "freeze", "trainable": ["last:1"]},
}


@pytest.fixture
def _written_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "writes_dropout", lambda device: True)


@pytest.fixture
def _same_masks(_written_dropout: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager linears, every one of which is adapted, take the masks of the written-out form, in the order of
    their calls, under the seed that the written-out form draws."""
    sites: Iterator[int] = iter(range(1000))

    def drop(x_TD: Tensor, probability: float) -> Tensor:
        mask = kept(x_TD.shape[0], x_TD.shape[1], _noise(), next(sites), probability)
        return x_TD * mask / (1 - probability)

    monkeypatch.setattr("tunesmith.model.lora.F", SimpleNamespace(dropout=drop, linear=F.linear))


def _noise() -> Noise:
    """What a pass after `torch.manual_seed(SEED)` draws from."""
    return Noise(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(SEED)))


def _decoder(directory: Path, method: dict[str, Any]) -> Decoder:
    quantize: Any = "nf4-double" if method["kind"] == "qlora" else None
    decoder = load_decoder(directory, quantize=quantize).train()
    apply_method(decoder, MethodSection(**{"rank": 4, **method}), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith((".B", "bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif name.endswith(("magnitude", "norm.weight")):
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return decoder


def _gradients(decoder: Decoder, is_fused: bool) -> dict[str, Tensor]:
    """The hidden states, and every gradient by its name."""
    decoder.is_fused = is_fused
    decoder.zero_grad()
    torch.manual_seed(SEED)
    hidden = decoder.hidden(pack_documents(DOCUMENTS))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden.float() * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **grads}


def _assert_equal(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert expected.keys() == found.keys()
    for name, truth in expected.items():
        assert found[name].dtype == truth.dtype
        error = (found[name] - truth).norm() / truth.norm().clamp(min=1e-6)
        assert float(error) < tolerance, f"{name}: {float(error):.2e}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_whole_blocks_equal_the_eager_ones(model: str, method: str, tiny_model_dir: Make) -> None:
    family, changes = MODELS[model]
    decoder = _decoder(tiny_model_dir(family, **changes), METHODS[method])
    expected = _gradients(decoder, False)
    found = _gradients(decoder, True)
    assert decoder.num_fused_blocks == 2
    # With biases, gradients of q and k cancel: the eager float32 ones are up to 2.5e-5 off float64's, these 1e-5.
    _assert_equal(expected, found, 6e-5 if "biases" in model else 2e-5)
    if method == "full":
        assert any("q_norm" in name for name in found) == family.startswith("qwen3")
        assert any("bias" in name for name in found) == (model in ("qwen2", "biases", "qwen3 biases"))
    if "dora" in method:
        assert any(name.endswith("magnitude") for name in found)


@pytest.mark.parametrize("kind", ["block", "selective", "tiles"])
@pytest.mark.parametrize("method", ["lora", "dora", "nf4 dora", "full"])
def test_checkpointing_and_tiles_change_nothing(kind: Any, method: str, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen3"), METHODS[method])
    expected = _gradients(decoder, True)
    if kind == "tiles":
        decoder.mlp_tile_tokens = 8
        _assert_equal(expected, _gradients(decoder, True))
        return
    decoder.checkpointing = kind
    found = _gradients(decoder, True)
    assert all(torch.equal(truth, found[name]) for name, truth in expected.items())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_bfloat16_is_as_close_as_the_eager_blocks(method: str, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen3"), METHODS[method])
    exact = _gradients(decoder, False)
    decoder.compute_dtype = torch.bfloat16
    eager, found = _gradients(decoder, False), _gradients(decoder, True)
    for name, truth in exact.items():
        norm = truth.norm().clamp(min=1e-6)
        assert (found[name] - truth).norm() / norm < 1.5 * (eager[name] - truth).norm() / norm + 1e-2, name


@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("model", MODELS)
def test_dropout_equals_the_eager_blocks_under_the_same_masks(model: str, kind: str, tiny_model_dir: Make) -> None:
    family, changes = MODELS[model]
    decoder = _decoder(tiny_model_dir(family, **changes), {"kind": kind, "dropout": 0.3})
    expected, found = _gradients(decoder, False), _gradients(decoder, True)
    assert decoder.num_fused_blocks == 2
    _assert_equal(expected, found)
    without = _decoder(tiny_model_dir(family, **changes), {"kind": kind})
    assert (_gradients(without, True)["hidden"] - found["hidden"]).norm() > 1e-3 * found["hidden"].norm()


@pytest.mark.usefixtures("_written_dropout")
@pytest.mark.parametrize("kind", ["block", "selective", "tiles"])
def test_recomputed_masks_are_the_same(kind: Any, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("qwen3"), {"kind": "lora", "dropout": 0.5})
    expected = _gradients(decoder, True)
    if kind == "tiles":
        decoder.mlp_tile_tokens = 8
        _assert_equal(expected, _gradients(decoder, True))
        return
    decoder.checkpointing = kind
    found = _gradients(decoder, True)
    assert all(torch.equal(truth, found[name]) for name, truth in expected.items())


@pytest.mark.usefixtures("_written_dropout")
def test_masks_follow_torchs_generator(tiny_model_dir: Make) -> None:
    """A pass draws one seed: other masks every time, the same ones from the same state, none in evaluation; and a pass
    whose backward comes after another pass keeps its own."""
    decoder = _decoder(tiny_model_dir("llama"), {"kind": "lora", "dropout": 0.5})
    expected, pack = _gradients(decoder, True), pack_documents(DOCUMENTS)
    torch.manual_seed(SEED)
    first, second = decoder.hidden(pack), decoder.hidden(pack)
    assert torch.equal(first, expected["hidden"])
    assert not torch.equal(first, second)
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    decoder.zero_grad()
    (first.float() * weights).sum().backward()
    grads = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())
    state = torch.get_rng_state()
    decoder.eval()
    assert torch.equal(decoder.hidden(pack), decoder.hidden(pack))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("family", "method", "whole"),
    [
        ("llama", {"kind": "lora", "dropout": 0.1}, 0),
        ("llama", {"kind": "lora", "dropout": 0.1, "dora": True}, 0),
        ("qwen3", {"kind": "lora", "dora": True}, 2),
        ("gpt2", {"kind": "lora"}, 0),
        ("mixtral", {"kind": "lora"}, 0),
    ],
)
def test_what_stays_eager_on_a_cpu(family: str, method: dict[str, Any], whole: int, tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir(family), method)
    decoder.is_fused = True
    assert decoder.num_fused_blocks == whole


def test_dropout_on_a_cpu_draws_as_the_eager_blocks_do(tiny_model_dir: Make) -> None:
    """Runs on a CPU repeat bit by bit what they were before there was another generator."""
    decoder = _decoder(tiny_model_dir("llama"), {"kind": "lora", "dropout": 0.5})
    _assert_equal(_gradients(decoder, False), _gradients(decoder, True))


def test_dropout_with_dora_stays_eager_everywhere(tiny_model_dir: Make, _written_dropout: None) -> None:
    decoder = _decoder(tiny_model_dir("llama"), {"kind": "lora", "dropout": 0.5, "dora": True})
    decoder.is_fused = True
    assert decoder.num_fused_blocks == 0


def test_norms_are_measured_again_unless_the_weights_are_promised_to_be_the_same(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir("llama"), METHODS["dora"])
    expected = _gradients(decoder, True)
    decoder.has_same_weights = True
    _assert_equal(expected, _gradients(decoder, True), 1e-12)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".B"):
                parameter.mul_(3)
    stale = _gradients(decoder, True)
    decoder.has_same_weights = False
    found = _gradients(decoder, True)
    _assert_equal(_gradients(decoder, False), found)
    assert (stale["hidden"] - found["hidden"]).norm() > 1e-3 * found["hidden"].norm()
