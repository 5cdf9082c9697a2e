"""The decoder's parts that parity with transformers does not see: dtypes, noise, fused linears, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.arch import RopeConfig, read_config
from tunesmith.checkpoint.load import load_decoder
from tunesmith.errors import ModelError
from tunesmith.model.layers import Linear, RMSNorm, apply_rope, rope_frequencies, rope_tables
from tunesmith.model.packed import pack_documents

Make = Callable[..., Path]
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8] * 20]


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_stream_runs_in_the_compute_dtype(family: str, compute: torch.dtype, tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir(family))
    pack = pack_documents(DOCUMENTS)
    exact = decoder.logits(decoder.hidden(pack))
    decoder.compute_dtype = compute
    hidden = decoder.hidden(pack)
    assert hidden.dtype == compute
    logits = decoder.logits(hidden)
    assert logits.dtype == compute
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.02)
    logits.float().sum().backward()
    assert {p.grad.dtype for p in decoder.parameters() if p.grad is not None} == {torch.float32}


def test_noise_is_uniform_and_by_document_length(tiny_model_dir: Make) -> None:
    """The noise was once scaled by the length of the whole pack, so that packing weakened it."""
    decoder = load_decoder(tiny_model_dir("llama")).train()
    decoder.noise_alpha = 5.0
    pack = pack_documents([[1] * 4, [2] * 400])
    noise = decoder.embed(pack.tokens_T, pack.positions_T, pack.length_of_each_token()).detach()
    noise = noise - decoder.embedding.weight.detach()[pack.tokens_T]
    for length, part in zip(pack.lengths, noise.split(list(pack.lengths)), strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert float(part.abs().max()) == pytest.approx(bound, rel=0.1)
        assert float(part.abs().max()) <= bound + 1e-6
    assert torch.equal(decoder.eval().hidden(pack), decoder.hidden(pack))


def test_too_long_for_learned_positions(tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir("gpt2"))
    with pytest.raises(ModelError, match="513 tokens, and the model 512 learned positions"):
        decoder.hidden(pack_documents([[1] * 513]))
    assert decoder.hidden(pack_documents([[1] * 512, [1]])).shape == (513, 32)


def test_every_expert_gets_a_gradient(tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir("mixtral"))
    decoder.hidden(pack_documents([[1]])).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.blocks.parameters())


def test_rows_of_a_fused_linear() -> None:
    linear = Linear(4, {"q_proj": 3, "k_proj": 2}, bias=True)
    linear.load_part("q_proj", torch.full((3, 4), 2.0), torch.full((3,), 5.0))
    linear.load_part("k_proj", torch.full((2, 4), 3.0, dtype=torch.float16))
    assert linear.rows("k_proj") == slice(3, 5)
    assert linear(torch.ones(1, 4)).tolist() == [[13.0, 13.0, 13.0, 12.0, 12.0]]
    assert torch.equal(linear.part_weight("k_proj"), torch.full((2, 4), 3.0))
    with pytest.raises(KeyError):
        linear.rows("v_proj")


def test_a_norm_of_16_bits_is_computed_in_32() -> None:
    norm = RMSNorm(1024, 1e-6)
    x = torch.full((1, 1024), 300.0, dtype=torch.float16)
    assert torch.equal(norm(x), torch.ones(1, 1024, dtype=torch.float16))


def test_rope_keeps_lengths_and_sees_distances_only() -> None:
    torch.manual_seed(0)
    inverse = rope_frequencies(RopeConfig(), 8)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            apply_rope(x, *rope_tables(inverse, torch.tensor([at]), torch.float32))
            for x, at in ((query, query_position), (key, key_position))
        ]
        assert float(turned[0].norm()) == pytest.approx(float(query.norm()), rel=1e-5)
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_building_a_model_does_not_import_the_compiler(tiny_model_dir: Make, torch_forks: Callable[..., str]) -> None:
    """torch's random start of an embedding on the meta device imported torch._dynamo: seconds at every start."""
    code = (
        "import sys; from pathlib import Path; from tunesmith.checkpoint.load import load_decoder;"
        "load_decoder(Path(sys.argv[1])); print('torch._dynamo' in sys.modules)"
    )
    assert torch_forks(code, tiny_model_dir("llama")).strip() == "False"


def test_a_config_survives(tiny_model_dir: Make) -> None:
    config = read_config(tiny_model_dir("qwen2"))
    assert load_decoder(tiny_model_dir("qwen2")).config == config


def test_rope_frequencies_are_copied_to_the_device_once(tiny_model_dir: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were computed on the host and copied in every forward pass, and each copy waited for the device."""
    calls: list[RopeConfig] = []

    def counted(rope: RopeConfig, head_dim: int) -> torch.Tensor:
        calls.append(rope)
        return rope_frequencies(rope, head_dim)

    monkeypatch.setattr("tunesmith.model.decoder.rope_frequencies", counted)
    decoder = load_decoder(tiny_model_dir("llama"))
    pack = pack_documents(DOCUMENTS)
    with torch.inference_mode():
        expected = decoder.hidden(pack).clone()
    hidden = decoder.hidden(pack)
    hidden.sum().backward()  # what inference made must serve training
    assert torch.equal(hidden, expected)
    assert len(calls) == 1
