"""Quantised weights that processes share have the values of one process, bit for bit, and say what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.checkpoint.held_save import save_held
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.speculate import NgramDrafter
from tunesmith.engine.tensor_parallel import TensorParallelRunner
from tunesmith.engine.tensor_plain import plain_hidden
from tunesmith.engine.tensor_serving import ServingMesh, SharedSource, load_share
from tunesmith.errors import ParallelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.held import HeldLinear
from tunesmith.model.language_model import logits
from tunesmith.model.weight_formats import WeightFormat
from tunesmith.parallel.mesh import Place
from tunesmith.watch.memory import LiveStorages

Ranks = Callable[..., list[Any]]
# Half of the MLP is three groups of 32, and tears one of 64 and one of 128.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
DOCUMENTS = [[5, 6, 7, 200, 31, 9], [77, 1, 3]]
GROUP = 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def packed(values: Tensor, order: list[int]) -> Tensor:
    """int32 [rows, columns / 8]: nibble i of word c is column 8 c + order[i]."""
    words = values.view(len(values), -1, 8)[:, :, order].long()
    return (words << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def quantised(width: int, rows: int, method: str, order: Tensor | None) -> dict[str, Tensor]:
    """A linear as AWQ or GPTQ writes it, of random codes."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    codes = torch.randint(0, 16, (width, rows), generator=generator)
    zeros = torch.randint(1, 16, (width // GROUP, rows), generator=generator)
    scales = (torch.rand(width // GROUP, rows, generator=generator) * 0.02 + 0.01).half()
    if method == "awq":
        return {"qweight": packed(codes, AWQ_ORDER), "qzeros": packed(zeros, AWQ_ORDER), "scales": scales}
    groups = torch.arange(width) // GROUP
    straight = list(range(8))
    return {
        "qweight": packed(codes.t().contiguous(), straight).t().contiguous(),
        "qzeros": packed(zeros - 1, straight),
        "g_idx": (groups if order is None else groups[order]).to(torch.int32),
        "scales": scales,
    }


def checkpoint(source: Path, target: Path, method: str, sorts: bool = False) -> Path:
    """`source` with the linears of its blocks in codes."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        rows, width = tensors.pop(name).shape
        order = torch.randperm(width, generator=torch.Generator().manual_seed(width)) if sorts else None
        parts = quantised(width, rows, method, order)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP, "desc_act": sorts}
    (target / "config.json").write_text(json.dumps(config))
    return target


def compressed(source: Path, target: Path) -> Path:
    """`source` as `tunesmith compress` stores it in int4."""
    model: Any = load_for_inference(source, quantize="int4-g32", device="cpu")
    shutil.copytree(source, target)
    save_held(model, target, WeightFormat("int4", 32))
    return target


def mesh() -> ServingMesh:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ServingMesh(Place(rank, size, rank), torch.device("cpu"))


def exactly(model: Any) -> Any:
    """Products with the dequantised weights in float32: a CPU's fast ones are in bfloat16. W8A8 and fp8 as they are."""
    for child in model.modules():
        if isinstance(child, HeldLinear) and not getattr(child, "has_int8_products", False):
            child.product = child.dense_product
        elif isinstance(child, Fp8Linear) and not isinstance(child, HeldLinear):
            child.compute = "fp8"
    return model


def one_process(directory: str, quantize: str | None, adapter: str | None = None) -> Any:
    model = load_for_inference(directory, quantize=quantize, adapter=adapter, device="cpu", dtype=torch.float32)
    return exactly(model)


def compare(models: list[tuple[str, str | None, str | None]]) -> list[tuple[float, list[str], float]]:
    """For each model: how far its logits are from one process's, which weights are not theirs, its share of bytes."""
    found = []
    for directory, quantize, adapter in models:
        whole = one_process(directory, quantize, adapter)
        part = exactly(load_share(SharedSource(directory, quantize=quantize, adapter=adapter), mesh()))
        with torch.no_grad():
            got, expected = part.logits(plain_hidden(part, DOCUMENTS)), torch.cat(logits(whole, DOCUMENTS))
        held, all_bytes = (sum(t.nbytes for t in m.blocks.state_dict().values()) for m in (part, whole))
        found.append((float((got - expected).abs().max()), different(part, whole), held / all_bytes))
    return found


def different(part: Decoder, whole: Decoder) -> list[str]:
    """Linears whose dequantised values are not this process's rows and columns of the whole's."""
    modules, bad = dict(whole.named_modules()), []
    for path, linear in part.named_modules():
        if (cut := getattr(linear, "cut", None)) is None:
            continue
        known: Any = linear
        of_whole: Any = modules[path]
        for name in known.parts:
            values: Tensor = of_whole.part_weight(name)[:, slice(*cut.shard.columns)]
            rows = torch.cat([values[slice(*span)] for span in cut.shard.rows(name)])
            if not torch.equal(known.part_weight(name), rows):
                bad.append(f"{path}.{name}")
    return bad


def test_formats(
    ranks: Ranks, tiny_model_dir: Callable[..., Path], make_adapter: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Quantised on load, and read from what AWQ, GPTQ and `tunesmith compress` wrote.

    W8A8 and fp8 round rows of which each process sees a part: by the largest of all.
    """
    base = tiny_model_dir("qwen2", **SIZES)
    models: list[tuple[Path, str | None]] = [(base, name) for name in ("int8", "w8a8", "int4-g32-sym", "fp8")]
    models += [(tiny_model_dir("gpt2", n_embd=64), "w8a8"), (base, "int4")]
    models += [(checkpoint(base, tmp_path / "awq", "awq"), None)]
    models += [(checkpoint(base, tmp_path / "sorted", "gptq", sorts=True), None)]
    models += [(compressed(base, tmp_path / "compressed"), None)]
    adapter = str(make_adapter(base))
    found = ranks(compare, 2, [(str(at), name, adapter if name == "int4" else None) for at, name in models])
    for of_rank in found:
        for (directory, name), (distance, bad, share) in zip(models, of_rank, strict=True):
            what = f"{directory.name} {name}"
            assert bad == [], what
            assert distance < 1e-5, f"{what}: {distance}"
            # Norms, scales of columns that are cut, and what fills the groups of sorted columns are beside the half.
            assert share < (0.75 if directory.name == "sorted" else 0.62), f"{what}: {share}"


CONFIG = EngineConfig(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=48, debug_pages=True)


def say(engine: Engine) -> list[list[int]]:
    """Greedy, sampled, and with log-probabilities of the prompt; guesses are verified."""
    params = [
        SamplingParams(max_tokens=12),
        SamplingParams(max_tokens=12, temperature=0.9, seed=3),
        SamplingParams(max_tokens=8, prompt_logprobs=1),
    ]
    ids = [engine.submit([5, 6, 7 + n] * 6, one) for n, one in enumerate(params)]
    done: dict[int, list[int]] = {}
    while engine.has_work:
        done.update({o.request_id: o.completion.token_ids for o in engine.step() if o.completion is not None})
    return [done[i] for i in ids]


def serve(models: list[tuple[str, str | None]]) -> list[list[list[int]]]:
    """The engine in the first rank; the others take part in its passes."""
    from tunesmith.engine.tensor_serving import follow_passes

    said = []
    for directory, quantize in models:
        decoder = exactly(load_share(SharedSource(directory, quantize=quantize), mesh()))
        if torch.distributed.get_rank():
            follow_passes(decoder, lambda: told(None), lambda kind: None)
            continue
        told({"kind": "runner", "config": vars(CONFIG), "num_pages": 30})
        runner = TensorParallelRunner(decoder, CONFIG, told, num_pages=30)
        said.append(say(Engine(runner, config=CONFIG, drafter=NgramDrafter(3, 1))))
        told({"kind": "stop"})
    return said


def told(message: Any) -> Any:
    """A message from the first rank to all; the others give None."""
    given = [message]
    torch.distributed.broadcast_object_list(given, 0)
    return given[0]


def test_answers(ranks: Ranks, tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_dir("qwen2", **SIZES)
    models = [(str(base), "w8a8"), (str(checkpoint(base, tmp_path / "sorted", "gptq", sorts=True)), None)]
    said = ranks(serve, 2, models)
    expected = [say(Engine(NativeRunner(one_process(*model), CONFIG, 30), config=CONFIG)) for model in models]
    assert said[0] == expected


def refused(directory: str, quantize: str) -> str:
    with pytest.raises(ParallelError) as error:
        load_share(SharedSource(directory, quantize=quantize), mesh())
    return str(error.value)


def test_what_can_not_be_divided_says_what_would_work(ranks: Ranks, tiny_model_dir: Callable[..., Path]) -> None:
    """A share of 48 columns has no whole group; two key-value heads are for one or two processes."""
    directory = str(tiny_model_dir("llama", **{**SIZES, "intermediate_size": 96}))
    for message in ranks(refused, 2, directory, "int4"):
        assert "96 columns is 48, not a multiple of 32" in message
        assert "set tensor_parallel_size to one of 1, or quantize to int8 or fp8" in message
    directory = str(tiny_model_dir("llama", **{**SIZES, "num_key_value_heads": 1}))
    assert (
        "tensor_parallel_size 2 does not divide the model's 1 key-value heads"
        in ranks(refused, 2, directory, "int8")[0]
    )


def peak_bytes(directory: str, quantize: str | None) -> tuple[int, int, int]:
    """The most that loading a share allocated at once, what it holds afterwards, and its largest tensor in float32."""
    source = SharedSource(directory, quantize=quantize)
    with LiveStorages() as live:
        decoder = load_share(source, mesh())
    held = {t.data_ptr(): t.nbytes for t in [*decoder.parameters(), *decoder.buffers()]}
    return live.peak_bytes, sum(held.values()), max(SIZES["intermediate_size"] * SIZES["hidden_size"] * 4, 272 * 64 * 4)


def test_no_process_ever_holds_the_whole(ranks: Ranks, tiny_model_dir: Callable[..., Path]) -> None:
    """Beside its share there is one projection, in the few forms that quantising goes through."""
    directory = str(tiny_model_dir("llama", **SIZES, num_hidden_layers=8))
    for quantize in (None, "int4-g32"):
        for peak, held, largest in ranks(peak_bytes, 2, directory, quantize):
            assert held <= peak < held + (12 if quantize else 2) * largest, (quantize, peak, held, largest)
