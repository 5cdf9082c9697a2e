"""Inputs of steps with prompts: padding behind them, last tokens in place; the kernel equals the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.kernels.prompt_inputs import PromptInputs, load_prompt_inputs


def _step(tokens: list[int], starts: list[int], contexts: list[int], columns: int = 3) -> PromptInputs:
    ids = torch.arange(len(tokens))
    return PromptInputs(
        torch.tensor(tokens),
        ids + 10,
        ids + 32,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        torch.arange(1, 1 + len(contexts) * columns, dtype=torch.int32).view(-1, columns),
    )


def test_what_is_not_the_steps_is_padding_and_nothing_of_the_step_before_stays() -> None:
    target = PromptInputs.empty(8, 4, 5, torch.device("cpu"))
    last = torch.tensor([50, 51, 52])
    load_prompt_inputs(_step([7] * 8, [0, 2, 4, 6, 8], [40, 40, 40, 40]), target, last, 16)
    load_prompt_inputs(_step([-2, 17, 42], [0, 1, 3], [17, 2]), target, last, 16)
    assert target.tokens.tolist() == [51, 17, 42, 0, 0, 0, 0, 0]
    assert target.positions.tolist() == [10, 11, 12, 0, 0, 0, 0, 0]
    assert target.slots.tolist() == [32, 33, 34, -1, -1, -1, -1, -1]
    assert target.starts.tolist() == [0, 1, 3, 3, 3]
    assert target.contexts.tolist() == [17, 2, 1, 1]
    assert target.tables[0, :2].tolist() == [1, 2]
    assert target.tables[1, 0] == 4


def test_a_step_of_nothing_is_padding_only() -> None:
    target = PromptInputs.empty(4, 2, 5, torch.device("cpu"))
    load_prompt_inputs(_step([7] * 4, [0, 2, 4], [40, 40]), target, torch.zeros(3, dtype=torch.int64), 16)
    load_prompt_inputs(target.first(0, 0), target, torch.zeros(3, dtype=torch.int64), 16)
    assert target.starts.tolist() == [0, 0, 0]
    assert target.slots.tolist() == [-1] * 4


KERNEL = """
import torch
from tunesmith.kernels.prompt_inputs import PromptInputs, load_prompt_inputs_reference
from tunesmith.kernels.prompt_inputs_triton import load_prompt_inputs_operator

generator = torch.Generator().manual_seed(0)
def ints(high, *shape):
    return torch.randint(0, high, shape, generator=generator)

for counts, room, requests, columns in (
    ([1, 5, 130, 1], 256, 8, 300), ([3], 8, 8, 2), ([1] * 40, 64, 64, 20), ([64, 64], 128, 2, 8), ([], 16, 3, 4)
):
    num, total = len(counts), sum(counts)
    source = PromptInputs(
        ints(99, total) - 40, ints(500, total), ints(5000, total),
        torch.tensor([0, *counts]).cumsum(0).int(), (ints(16 * columns - 1, num) + 1).int(),
        ints(99, num, columns).int(),
    )
    last = ints(50, 65)
    expected, found = (PromptInputs.empty(room, requests, 512, torch.device("cpu")) for _ in range(2))
    for inputs in (expected, found):  # of a step before, whose first start is zero as well
        for tensor in (*inputs.tensors()[:3], inputs.starts[1:], inputs.contexts):
            tensor.fill_(77)
    load_prompt_inputs_reference(source, expected, last, 16)
    load_prompt_inputs_operator(*source.tensors(), *found.tensors(), last, 16)
    for one, other in zip(found.tensors()[:-1], expected.tensors()[:-1], strict=True):
        assert torch.equal(one, other), (counts, one, other)
    for row, context in enumerate(source.contexts.tolist()):
        pages = (context + 15) // 16
        assert torch.equal(found.tables[row, :pages], expected.tables[row, :pages]), (counts, row)
print("equal")
"""


def test_the_kernel_equals_the_reference_under_tritons_interpreter(
    interpreter: Callable[[Path], tuple[int, str]], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL, encoding="utf-8")
    status, output = interpreter(script)
    assert status == 0, output
    assert "equal" in output


@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_the_kernel_compiles_for_chips(chip: int) -> None:
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.prompt_inputs_triton import _load_kernel

    if not hasattr(_load_kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    wide = ("tokens", "positions", "slots")
    names = [name for name in _load_kernel.arg_names if not name.isupper()]
    types = {name: "*i64" if name.removeprefix("to_") in (*wide, "last_tokens") else "*i32" for name in names[:13]}
    types |= dict.fromkeys(names[13:], "i32")
    constants = {"PAGE": 16, "TOKENS": 64, "COLUMNS": 256}
    signature = {name: types.get(name, "constexpr") for name in _load_kernel.arg_names}
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(13)}
    source = ASTSource(_load_kernel, signature, constants, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 2, "enable_fp_fusion": True}
    )
    assert "ld.global" in made.asm["ptx"]
