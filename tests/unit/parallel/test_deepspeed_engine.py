"""What DeepSpeed's engine is refused for; what it trains is in tests/unit/train/test_deepspeed_update.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tunesmith.errors import ParallelError
from tunesmith.parallel.mesh import joined
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


def refused(place: str, precision: str) -> str:
    """What is said to weights on NVMe where float16 can't be computed with; nothing where they would be built."""
    from tunesmith.parallel import deepspeed_engine
    from tunesmith.parallel.deepspeed_install import require_deepspeed

    require_deepspeed("cpu")
    from deepspeed.accelerator import get_accelerator

    settings = ParallelSection(strategy="zero3", engine="deepspeed", offload="nvme", offload_folder=place)
    recipe = TrainSection(learning_rate=1e-3, precision=precision, master_weights="float32")  # type: ignore[arg-type]
    module = nn.Linear(3000, 1000)
    with joined(settings, "cpu") as mesh, pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_engine, "nvme_lacks", lambda with_cuda: [])
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
        config = deepspeed_config(settings, recipe, module, 4, mesh, micro_batches=1)
        buffers = config.values["zero_optimization"]["offload_param"]
        assert buffers["buffer_size"] == module.weight.numel() and buffers["buffer_count"] >= 5
        if precision == "bfloat16":
            deepspeed_engine._require_operators(config, mesh.device)
            return ""
        with pytest.raises(ParallelError) as caught:
            DeepSpeedUpdater(module, recipe, 4, config, mesh)
    return str(caught.value)


def test_weights_on_nvme_keep_their_dtype_or_are_refused(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """On a CPU without float16 DeepSpeed rounds float32 weights on the disk to bfloat16, and says nothing."""
    (said,) = ranks(refused, 1, str(tmp_path), "float32")
    assert "keeps weights on NVMe in bfloat16" in said and "set it to bfloat16" in said
    assert ranks(refused, 1, str(tmp_path), "bfloat16") == [""]
