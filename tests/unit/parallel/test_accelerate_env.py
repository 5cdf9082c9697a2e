"""What accelerate puts into the environment, as the recipe's section."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.errors import ParallelError, RecipeError
from tunesmith.parallel.accelerate_env import from_accelerate
from tunesmith.recipe.parallel import ParallelSection

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}


def test_without_accelerate_nothing_changes() -> None:
    settings = ParallelSection(strategy="zero2")
    assert from_accelerate({"RANK": "0", "ACCELERATE_MIXED_PRECISION": "bf16"}, settings) == (settings, ())


def test_deepspeed_is_chosen_and_said() -> None:
    offload = {
        **DEEPSPEED,
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    settings, notes = from_accelerate(offload, ParallelSection())
    assert (settings.engine, settings.strategy, settings.offload) == ("deepspeed", "zero3", "cpu")
    assert "accelerate's ACCELERATE_DEEPSPEED_ZERO_STAGE: parallel.strategy is zero3" in notes
    assert any("ACCELERATE_MIXED_PRECISION bf16 is not read" in note for note in notes)


def test_a_file_is_passed_on() -> None:
    settings, _ = from_accelerate({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, ParallelSection())
    assert (settings.deepspeed_config, settings.strategy) == ("ds.json", "auto")


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ({"FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, "zero3"),
        ({"FSDP_SHARDING_STRATEGY": "2"}, "zero2"),
        ({"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "ddp"),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, "zero2"),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, "zero3"),
    ],
)
def test_fsdp_becomes_a_native_strategy(given: dict[str, str], strategy: str) -> None:
    settings, _ = from_accelerate({**FSDP, **given}, ParallelSection())
    assert (settings.engine, settings.strategy) == ("native", strategy)


def test_a_recipe_that_says_something_else_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"parallel\.strategy is zero2.*ZERO_STAGE makes it zero3"):
        from_accelerate(DEEPSPEED, ParallelSection(engine="deepspeed", strategy="zero2"))


def test_a_divided_sequence_is_refused_with_what_there_is() -> None:
    given = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
    with pytest.raises(ParallelError, match=r"set it to 1, and PARALLELISM_CONFIG_TP_SIZE, or .* offload"):
        from_accelerate(given, ParallelSection())


@pytest.mark.parametrize(
    "given",
    [
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
        {**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
    ],
)
def test_what_there_is_not_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ParallelError):
        from_accelerate(given, ParallelSection())


def test_accelerate_itself_sets_these_variables(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nuse_cpu: true\nnum_processes: 1\nnum_machines: 1\n"
        "machine_rank: 0\nmixed_precision: 'no'\nfsdp_config:\n  fsdp_version: 2\n"
        "  fsdp_reshard_after_forward: true\n  fsdp_offload_params: true\n"
    )
    script = tmp_path / "show.py"
    script.write_text(
        f"import json, os\nopen({str(tmp_path / 'found.json')!r}, 'w').write(json.dumps(dict(os.environ)))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = json.loads((tmp_path / "found.json").read_text())
    if found.get("ACCELERATE_USE_FSDP") != "true":
        pytest.skip("this accelerate runs FSDP on GPUs only")
    settings, _ = from_accelerate(found, ParallelSection())
    assert (settings.engine, settings.strategy, settings.offload) == ("native", "zero3", "cpu")


def test_a_combination_that_is_none_is_refused() -> None:
    given = {**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP", "FSDP_OFFLOAD_PARAMS": "true"}
    with pytest.raises(RecipeError, match=r"parallel\.offload cpu goes with parallel\.strategy zero3"):
        from_accelerate(given, ParallelSection())
