"""The launches that are taken down for a recipe are those of its blocks with real tensors, and compile nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.load import load_model
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.warm_up import taken_down
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import packed
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.train.losses import cross_entropy_sum, head_of
from tunesmith.verify.launches import launches_of

pytest.importorskip("triton")
TOKENS = 64


@pytest.fixture(autouse=True)
def _compiled() -> None:
    from triton.runtime.jit import JITFunction

    from tunesmith.kernels.rms_norm_triton import _normalise_kernel

    if not isinstance(_normalise_kernel, JITFunction):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")


def _recipe(**sections: Any) -> Recipe:
    train = {"micro_batch_tokens": TOKENS, "precision": "bfloat16", **sections.pop("train", {})}
    return recipe_from_mapping(
        {"model": {"path": "builtin:tiny"}, "data": {"max_length": TOKENS}, "train": train, **sections}
    )


def _really_launched(recipe: Recipe) -> set[tuple[Any, ...]]:
    """By a model with storage, whose kernels do nothing."""
    quantise: Any = recipe.method.quantisation
    model: Any = load_model("builtin:tiny", device="cpu", dtype="bfloat16", weights="random")
    apply_method(model, recipe.method, seed=0)
    assert quantise == recipe.method.quantisation
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.compute_dtype, model.is_fused, model.checkpointing = torch.bfloat16, True, recipe.train.checkpointing
    pack = packed(torch.zeros(TOKENS, dtype=torch.int64), (TOKENS // 2, TOKENS // 2))
    index = torch.arange(TOKENS - 5)
    with kernels_on("cpu"), taken_down() as launches:
        hidden = model.train().hidden(pack)
        loss = cross_entropy_sum(hidden, index, torch.zeros_like(index), head_of(model), recipe.train.loss_chunk_tokens)
        loss.backward()
    return {launch.key for launch in launches}


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_they_are_those_of_real_tensors(kind: str, checkpointing: str) -> None:
    recipe = _recipe(method={"kind": kind}, train={"checkpointing": checkpointing})
    foreseen = {launch.key for launch in launches_of(recipe, certified=False)}
    launched = _really_launched(recipe)
    assert launched
    assert launched <= foreseen


def test_the_certificates_own_are_in_float32() -> None:
    own = launches_of(_recipe(), certified=False)
    both = launches_of(_recipe())
    assert {launch.key for launch in own} < {launch.key for launch in both}
    more = both[len(own) :]
    assert all(any(getattr(x, "dtype", None) == torch.float32 for x in launch.arguments) for launch in more)


def test_full_fine_tuning_of_a_wide_model_updates_by_kernels() -> None:
    recipe = recipe_from_mapping(
        {
            "model": {"path": "recipes/configs/llama-3.2-3b", "weights": "random"},
            "method": {"kind": "full"},
            "data": {"format": "tokens", "max_length": 512},
            "train": {"micro_batch_tokens": 2048},
        }
    )
    names = [launch.name for launch in launches_of(recipe, certified=False)]
    assert {"_norm_kernel", "_update_kernel"} <= set(names)


def test_taking_down_leaves_the_compiler_out(torch_forks: Callable[..., str]) -> None:
    """It was imported by the operators' descriptions on the meta device: most of what taking down took."""
    code = (
        "import sys, torch\n"
        "from tunesmith.recipe.load import recipe_from_mapping\n"
        "from tunesmith.verify.launches import launches_of\n"
        "found = launches_of(recipe_from_mapping({'model': {'path': 'builtin:tiny'}}))\n"
        "print('torch._dynamo' in sys.modules, '_dynamo' in vars(torch), len(found) > 5)\n"
        "import torch._dynamo\n"
        "print(callable(torch._dynamo.explain))\n"
    )
    assert torch_forks(code).split() == ["False", "False", "True", "True"]


def test_what_needs_the_compiler_is_taken_down_with_it(torch_forks: Callable[..., str]) -> None:
    code = (
        "import sys, torch\n"
        "from tunesmith.kernels import warm_up\n"
        "tries = []\n"
        "def computation():\n"
        "    tries.append(hasattr(torch._dynamo, 'explain'))\n"
        "    torch._dynamo.explain\n"
        "warm_up.recorded(computation)\n"
        "print(tries)\n"
    )
    assert torch_forks(code).strip() == "[False, True]"
