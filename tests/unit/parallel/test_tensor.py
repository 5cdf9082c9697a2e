"""Two and four processes that share every matrix must train as one does: losses, every gradient, twenty steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.arch import config_from_dict
from tunesmith.errors import ParallelError
from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import PackedTokens, packed
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.parallel.tensor import (
    own_targets,
    own_tokens,
    partial_parameters,
    placements,
    shard_tensors,
    sum_partial_gradients,
    whole_tensor,
)
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import MethodSection
from tunesmith.train.losses import cross_entropy_sum, head_of, trained_positions

Ranks = Callable[..., list[Any]]
LENGTHS = (5, 13, 1, 9, 3)  # 31 tokens: neither two nor four processes divide them
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {**_SMALL, "hidden_size": 128, "tie_word_embeddings": True},
    "llama": {**_SMALL, "attention_bias": True, "mlp_bias": True},
    "qwen3": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 4},
    "mixtral": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 8, "n_positions": 64},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4, "alpha": 4, "rslora": True},
    "dora": {"kind": "lora", "rank": 4, "alpha": 8, "dora": True},
    "qlora": {"kind": "qlora", "rank": 4, "alpha": 8},
    "qdora": {"kind": "qlora", "rank": 4, "alpha": 8, "dora": True, "double_quantisation": False},
}


def make_decoder(family: str, method: str) -> Decoder:
    """A tiny decoder whose every parameter, adapters included, differs from the others."""
    decoder = Decoder(config_from_dict({"model_type": family, **MODELS[family]}))
    generator = torch.Generator().manual_seed(3)
    _fill(decoder, generator)
    apply_method(decoder, MethodSection(**METHODS[method]), seed=1)
    for linear in (child for child in decoder.modules() if isinstance(child, AdaptedLinear)):
        _fill(linear.adapters, generator)
    return decoder.train()


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        noise = torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
        is_scale = parameter.ndim == 1 and not name.endswith("bias")
        parameter.copy_(1 + noise if is_scale else noise)


def make_pack(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> tuple[PackedTokens, Tensor]:
    """Ragged documents, and targets of which a third is not trained."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 96, (sum(lengths),), generator=generator)
    targets = torch.randint(0, 96, tokens.shape, generator=generator)
    targets[torch.rand(tokens.shape, generator=generator) < 1 / 3] = -100
    return packed(tokens, lengths), targets


def loss_of(decoder: Decoder, pack: PackedTokens, targets: Tensor, mesh: Mesh | None) -> Tensor:
    """The sum of the losses of this process's tokens, over the trained tokens of the pack."""
    index, wanted = trained_positions(targets)
    total = index.numel()
    if mesh is not None:
        index, wanted = own_targets(index, wanted, targets.numel(), mesh)
    return cross_entropy_sum(decoder.hidden(pack), index, wanted, head_of(decoder), 16) / total


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


def summed(value: Tensor, mesh: Mesh) -> Tensor:
    total = value.detach().clone()
    torch.distributed.all_reduce(total, group=mesh.group("tp"))
    return total


def whole_gradients(decoder: Decoder) -> dict[str, Tensor]:
    parameters = dict(decoder.named_parameters())
    out = {}
    for name, placement in placements(decoder).items():
        gradient = parameters[name].grad
        local = parameters[name] if gradient is None else gradient
        out[name] = whole_tensor(decoder, local, placement)
    return out


def compare(cases: list[tuple[str, str]], changes: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Case -> what differs by how much: the loss, and each gradient."""
    out = {}
    with joined(ParallelSection(tensor=torch.distributed.get_world_size()), "cpu") as mesh:
        for case in cases:
            alone = make_decoder(*case)
            for name, value in changes.items():
                setattr(alone, name, value)
            shared = copy.deepcopy(alone)
            shard_tensors(shared, mesh)
            pack, targets = make_pack()
            expected = loss_of(alone, pack, targets, None)
            expected.backward()
            got = loss_of(shared, pack, targets, mesh)
            got.backward()
            sum_partial_gradients(shared)
            out[case] = {"loss": relative(summed(got, mesh), expected)}
            gradients = whole_gradients(shared)
            wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
            assert gradients.keys() == wanted.keys()
            out[case] |= {name: relative(gradients[name], gradient) for name, gradient in wanted.items()}
    return out


def check(ranks: Ranks, count: int, cases: list[tuple[str, str]], **changes: Any) -> None:
    for of_rank in ranks(compare, count, cases, changes):
        for case in cases:
            assert {name: value for name, value in of_rank[case].items() if not value <= 1e-5} == {}, case


@pytest.mark.parametrize("family", list(MODELS))
def test_two_processes_have_the_gradients_of_one(ranks: Ranks, family: str) -> None:
    check(ranks, 2, [(family, method) for method in METHODS])


def test_four_processes_have_the_gradients_of_one(ranks: Ranks) -> None:
    check(ranks, 4, [("qwen2", "full"), ("llama", "dora"), ("qwen3", "full"), ("mistral", "lora"), ("gpt2", "full")])


@pytest.mark.parametrize("family", list(MODELS))
def test_written_out_blocks_exchange_tokens_too(ranks: Ranks, family: str) -> None:
    check(ranks, 2, [(family, method) for method in METHODS], is_fused=True)


@pytest.mark.parametrize("kind", ["selective", "block"])
def test_written_out_blocks_are_checkpointed(ranks: Ranks, kind: str) -> None:
    cases = [("qwen3", "full"), ("llama", "dora"), ("qwen2", "qlora"), ("mixtral", "lora")]
    check(ranks, 2, cases, is_fused=True, checkpointing=kind)


def test_written_out_blocks_of_four_processes_take_the_mlp_in_tiles(ranks: Ranks) -> None:
    check(ranks, 4, [("qwen2", "full"), ("mistral", "dora")], is_fused=True, mlp_tile_tokens=3)


@pytest.mark.parametrize("kind", ["block", "selective"])
def test_checkpointed_blocks_exchange_tokens_again(ranks: Ranks, kind: str) -> None:
    check(ranks, 2, [("qwen3", "full"), ("llama", "dora"), ("qwen2", "qlora")], checkpointing=kind)


def train(cases: list[tuple[str, str]]) -> list[list[tuple[float, float]]]:
    """For each case the losses of twenty steps of one process, and of all together."""
    with joined(ParallelSection(tensor=torch.distributed.get_world_size()), "cpu") as mesh:
        return [_train_both(family, method, mesh) for family, method in cases]


def _train_both(family: str, method: str, mesh: Mesh) -> list[tuple[float, float]]:
    alone, shared = make_decoder(family, method), make_decoder(family, method)
    shard_tensors(shared, mesh)
    of_alone, of_shared = (_optimizer(decoder) for decoder in (alone, shared))
    out = []
    for step in range(20):
        pack, targets = make_pack(step % 4, (7, 10 + step % 3, 4))
        expected, got = loss_of(alone, pack, targets, None), loss_of(shared, pack, targets, mesh)
        for optimizer, loss, decoder in ((of_alone, expected, alone), (of_shared, got, shared)):
            optimizer.zero_grad()
            loss.backward()
            sum_partial_gradients(decoder)
            optimizer.step()
        out.append((expected.item(), summed(got, mesh).item()))
    return out


def _optimizer(decoder: Decoder) -> torch.optim.Optimizer:
    # The large epsilon keeps gradients of nearly zero from being divided by themselves.
    trained = [p for p in decoder.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, eps=1e-4, weight_decay=0.1)


def test_twenty_steps_have_the_losses_of_one_process(ranks: Ranks) -> None:
    cases = [("llama", "full"), ("qwen2", "lora"), ("qwen3", "qlora"), ("mistral", "dora")]
    for losses in ranks(train, 2, cases)[0]:
        expected, got = zip(*losses, strict=True)
        assert got == pytest.approx(expected, rel=1e-5)
        assert expected[-1] < expected[0]


def _placed(family: str, method: str) -> tuple[dict[str, Any], list[str], int]:
    with joined(ParallelSection(tensor=2), "cpu") as mesh:
        decoder = make_decoder(family, method)
        shard_tensors(decoder, mesh)
        held = sum(p.numel() for p in decoder.parameters())
        return placements(decoder), list(partial_parameters(decoder)), held


def test_placements_say_which_part_of_the_whole_is_held(ranks: Ranks) -> None:
    (first, partial, held), (second, _, _) = ranks(_placed, 2, "llama", "full")
    whole = {name: p.shape for name, p in make_decoder("llama", "full").named_parameters()}
    assert {name: placement.shape for name, placement in second.items()} == whole
    qkv = second["blocks.0.attention.qkv.weight"]
    assert [chunk.whole[0] for chunk in qkv.chunks] == [(64, 128), (160, 192), (224, 256)]
    assert [chunk.local[0] for chunk in qkv.chunks] == [(0, 64), (64, 96), (96, 128)]
    assert [chunk.whole for chunk in second["blocks.1.mlp.down.weight"].chunks] == [((0, 64), (64, 128))]
    assert [len(placed["blocks.1.mlp.down.bias"].chunks) for placed in (first, second)] == [1, 0]
    assert "head.weight" in partial and "blocks.0.mlp_norm.weight" in partial
    assert not any("weight" in name for name in partial if "attention.qkv" in name)
    sharded = sum(shape.numel() for name, shape in whole.items() if name not in partial and "bias" not in name)
    assert held < sum(shape.numel() for shape in whole.values()) - sharded // 2 + 1


def test_a_part_of_a_shard_lies_where_its_rows_do(ranks: Ranks) -> None:
    placed, _, _ = ranks(_placed, 2, "llama", "full")[1]
    (query, key) = placed["blocks.0.attention.qkv.weight"].within(((60, 70), (0, 64)))
    assert (query.local[0], query.whole[0]) == ((0, 4), (124, 128))
    assert (key.local[0], key.whole[0]) == ((4, 10), (160, 166))


def test_adapters_of_shards(ranks: Ranks) -> None:
    placed, partial, _ = ranks(_placed, 2, "qwen3", "dora")[0]
    up, down = "blocks.0.mlp.up.adapters.gate_proj", "blocks.0.mlp.down.adapters.down_proj"
    assert {name for name in placed if name.startswith(("blocks.0.mlp.up.", "blocks.0.mlp.down."))} & set(partial) == {
        f"{up}.A",
        f"{up.replace('gate', 'up')}.A",
        f"{down}.B",
        f"{down}.magnitude",
    }
    assert placed[f"{up}.B"].chunks[0].whole == ((0, 64), (0, 4))
    assert placed[f"{down}.A"].shape == (4, 128)


def _refusals(changes: dict[str, Any], method: dict[str, Any]) -> str:
    with joined(ParallelSection(tensor=torch.distributed.get_world_size()), "cpu") as mesh:
        decoder = Decoder(config_from_dict({"model_type": "qwen3", **_SMALL, **changes}))
        _fill(decoder, torch.Generator().manual_seed(0))
        apply_method(decoder, MethodSection(**method), seed=0)
        with pytest.raises(ParallelError) as error:
            shard_tensors(decoder, mesh)
        return str(error.value)


@pytest.mark.parametrize(
    ("count", "changes", "method", "message"),
    [
        (
            4,
            {"num_key_value_heads": 2},
            {"kind": "full"},
            "does not divide the model's 2 key-value heads: .* one of 1, 2",
        ),
        (2, {"intermediate_size": 127}, {"kind": "full"}, "127 features of the MLP: set it to one of 1$"),
        (2, {}, {"kind": "lora", "dropout": 0.1}, "set method.dropout to 0"),
        (4, {}, {"kind": "qlora"}, "a share of its columns is 32 values, not a multiple of 64"),
    ],
)
def test_what_can_not_be_shared_is_refused(
    ranks: Ranks, count: int, changes: dict[str, Any], method: dict[str, Any], message: str
) -> None:
    for text in ranks(_refusals, count, changes, method):
        assert re.search(message, text)


def _graphs() -> str | None:
    with joined(ParallelSection(tensor=2), "cpu") as mesh:
        decoder = make_decoder("qwen2", "lora")
        decoder.captured = CapturedBlocks()
        shard_tensors(decoder, mesh)
        return decoder.captured.refused


def test_blocks_that_exchange_tokens_are_not_recorded(ranks: Ranks) -> None:
    """And the run directory says so."""
    assert all("parallel.tensor" in str(reason) for reason in ranks(_graphs, 2))


def _sliced() -> tuple[list[int], list[int], range]:
    with joined(ParallelSection(tensor=2), "cpu") as mesh:
        index, targets = own_targets(torch.tensor([0, 2, 3, 6]), torch.tensor([10, 12, 13, 16]), 7, mesh)
        return index.tolist(), targets.tolist(), own_tokens(7, mesh)


def test_targets_are_those_of_a_process_s_own_tokens(ranks: Ranks) -> None:
    assert ranks(_sliced, 2) == [([0, 2, 3], [10, 12, 13], range(4)), ([2], [16], range(4, 8))]
