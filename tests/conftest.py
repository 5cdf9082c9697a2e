"""What all tests share: no network, caches in a temporary folder, one thread, tiny models made on the spot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Plain torch, but where a test asks for `cpu_operations`: every worker would compile our own in its empty cache.
os.environ.setdefault("TUNESMITH_CPU_TRAIN", "0")
# A process that trained keeps its memory (train/allocator.py), and tests of memory come after tests of training.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "131072")
# Compiling takes as long as many tests: engines go through torch but where a test asks for the library.
os.environ.setdefault("TUNESMITH_CPU_STEP", "0")
os.environ.setdefault("CXXFLAGS", "-O1")

ROOT = Path(__file__).resolve().parents[1]
_PATH = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMALL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts_per_tok": 2}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 16},
    "qwen2": _SMALL,
    "qwen3": {**_SMALL, "head_dim": 8},
    "mixtral": {**_SMALL, **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_SMALL, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt2": {"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; leave the long campaigns to `-m long`."""
    wants_long = "long" in config.getoption("-m", default="")
    for item in items:
        if item.get_closest_marker("long") and not wants_long:
            item.add_marker(pytest.mark.skip(reason="a long campaign: make test-long"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches go to a temporary folder; torch takes one thread (as many as xdist has workers would fight)."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`ranks(function, world_size, *arguments)` calls a function of a test file in several processes (ranks.py)."""
    sys.path.insert(0, str(ROOT / "tests"))
    from ranks import RankPool

    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def torch_forks() -> Iterator[Callable[..., str]]:
    """`torch_forks(code, *arguments, **environment)`: what code prints in a process that has imported torch alone.

    A fork of one that stays (forks.py). Code that fails or exits with a status other than 0 fails the test.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "forks.py")],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    into, out_of = process.stdin, process.stdout

    def printed(code: str, *arguments: str | Path, **environment: str) -> str:
        request = {"code": code, "arguments": [*map(str, arguments)], "environment": environment}
        into.write(json.dumps(request) + "\n")
        into.flush()
        status, shown, errors = json.loads(out_of.readline())
        assert status == 0, f"exit status {status}\n{shown[-2000:]}\n{errors[-4000:]}"
        return str(shown)

    yield printed
    into.close()
    out_of.close()
    process.wait()


@pytest.fixture(scope="session")
def kernel_cache() -> Path:
    """A cache folder with our C++ for answers on a CPU, compiled; empty where it can't be.

    Workers and later runs share it: what lies there is named by its sources.
    """
    from tunesmith.kernels import cpu_library

    folder = ROOT / "build" / "test-kernels"
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu_library.SWITCH, "1")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        cpu_library.load.__wrapped__()
    return folder


@pytest.fixture(scope="session")
def compiled_library(kernel_cache: Path) -> Any:
    """Our own C++ for answers on a CPU, as an engine has it by default."""
    from tunesmith.kernels import cpu_library

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu_library.SWITCH, "1")
        patch.setenv("XDG_CACHE_HOME", str(kernel_cache))
        library = cpu_library.load.__wrapped__()
    if library is None:
        pytest.skip("no C++ compiler here")
    return library


@pytest.fixture
def cpu_operations(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training in float32 computes by our own C++ (kernels/cpu_train.py), as it does for a user who has a compiler."""
    from tunesmith.kernels import cpu_train

    monkeypatch.setenv(cpu_train.SWITCH, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache))
    cpu_train.forget()
    if not cpu_train.prepare():
        pytest.skip(f"no operations compiled here: {cpu_train.facts()['reason']}")
    yield
    cpu_train.forget()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data for tests; skips where it is absent."""
    path = Path(os.environ.get("TUNESMITH_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"test data is absent: set TUNESMITH_TEST_DATA to its folder (looked in {path.name})")
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a family's name (and changes to its configuration) to a directory with a tiny random model,
    saved by transformers, and a byte-level tokenizer with a ChatML template. The same call gives the same folder."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen2", **changes: Any) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            made[key] = _save_tiny_model(tmp_path_factory.mktemp(family), family, changes)
        return made[key]

    return make


def _save_tiny_model(directory: Path, family: str, changes: dict[str, Any]) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
    config = AutoConfig.for_model(family, **{**FAMILY_CONFIGS[family], **special, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer: 256 bytes, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258 (end of turn)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def _command_line() -> list[str]:
    """The console script where tunesmith is installed; else what it does."""
    script = Path(sys.executable).with_name("tunesmith")
    return (
        [str(script)]
        if script.exists()
        else [sys.executable, "-c", f"{_PATH}from tunesmith.cli.main import main; main()"]
    )


@pytest.fixture
def tunesmith_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the command line in a fresh process, in a temporary folder, and returns what it did."""

    def run(
        *arguments: str | Path,
        cwd: Path | None = None,
        check: bool = False,
        timeout: float = 120,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [*_command_line(), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=cwd or tmp_path,
            env={**os.environ, "COLUMNS": "120", "PYTHONUTF8": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
