"""Is this machine ready? Each lack comes with the command that mends it.

The driver is looked at first, then torch's build by its files, and only then is torch imported, in a process of its
own: a broken build can crash, and the caller's process must not start CUDA (it may fork later).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.hardware import total_memory_bytes, usable_cores
from tunesmith.units import GB, MB, format_bytes
from tunesmith.watch.driver import Driver, TorchBuild, find_driver, read_torch_build

Level = Literal["ok", "note", "warning", "error"]
_SCARCE_MEMORY_BYTES = 4 * GB
_SCARCE_DISK_BYTES = 5 * GB
_NO_DISK_BYTES = GB // 2
_SCARCE_SHARED_BYTES = 128 * MB
_PROBE_TIMEOUT_S = 180
_REQUIRED = ("numpy", "safetensors", "tokenizers", "transformers", "huggingface_hub", "pydantic", "yaml", "jinja2")
_EXTRAS = {
    "tensorboard": ("tensorboard", "curves in TensorBoard"),
    "data": ("datasets", "Hub data sets and parquet"),
    "gpu": ("pynvml", "GPU clocks, power and utilisation"),
    "wandb": ("wandb", "Weights & Biases"),
    "mlflow": ("mlflow", "MLflow"),
    "swanlab": ("swanlab", "SwanLab"),
}
_PROBE = """
import json, sys
facts = {}
try:
    import torch
    facts["version"] = torch.__version__
    a = torch.arange(6.0).reshape(2, 3)
    facts["cpu_product"] = (a @ a.T).tolist()
    facts["cuda_available"] = torch.cuda.is_available()
    if len(sys.argv) > 1:
        torch.cuda.init()
        facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["cuda_product"] = [
            (a.to(f"cuda:{i}") @ a.T.to(f"cuda:{i}")).cpu().tolist() for i in range(torch.cuda.device_count())
        ]
except BaseException as error:
    facts["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
print("\\n" + json.dumps(facts))
"""
_NOWHERE = "no driver answers, and no NVIDIA device is on the PCI bus; in a container it takes: docker run --gpus all"
_PRODUCT = [[5.0, 14.0], [14.0, 50.0]]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `mend` is the command, or the step, that mends a warning or an error."""

    name: str
    level: Level
    detail: str
    mend: str | None = None


def check_up(directory: Path | None = None) -> list[Finding]:
    """Look at everything a run needs. Never raises for what it finds; starts no CUDA in this process.

    Args: directory: where runs will be written (its disk is looked at); the current one by default.
    """
    driver, build = find_driver(), read_torch_build()
    findings = [_python(), *_driver(driver), *_build_against_driver(driver, build)]
    if build is not None:
        findings += _probe_findings(driver, build, _probe(with_cuda=driver.has_gpu and build.cuda is not None))
    findings += [*_compiler(driver), _triton(driver), *_packages()]
    findings += [_memory(), *_disk(directory or Path.cwd()), *_cpu(), *_shared_memory(), *_extras(driver)]
    return findings


def has_errors(findings: list[Finding]) -> bool:
    """Whether anything must be mended before a run."""
    return any(finding.level == "error" for finding in findings)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "ok", version)


def _driver(driver: Driver) -> Iterator[Finding]:
    if driver.problem is not None:
        yield Finding("driver", "error", driver.problem, driver.mend)
    elif driver.version is None:
        yield Finding("driver", "ok", f"no NVIDIA GPU: everything runs on the CPU ({_NOWHERE})")
    else:
        cuda = f", runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
        yield Finding("driver", "ok", f"{driver.version}{cuda}: {', '.join(driver.gpus) or 'GPU'}")


def _build_against_driver(driver: Driver, build: TorchBuild | None) -> Iterator[Finding]:
    if build is None:
        yield Finding("torch", "error", "not installed", "pip install torch")
        return
    if not driver.has_gpu:
        if build.cuda is None:
            yield Finding(
                "torch build", "ok", f"{build.version}, without CUDA: for the CPU only (see pytorch.org for a GPU)"
            )
        return
    if build.cuda is None:
        yield Finding(
            "torch build",
            "error",
            f"torch {build.version} is built without CUDA, and there is a GPU",
            "pip uninstall -y torch && pip install torch   (pytorch.org names the build for your driver)",
        )
    elif driver.cuda is not None and build.cuda[0] > driver.cuda[0]:
        wanted, have = f"{build.cuda[0]}.{build.cuda[1]}", f"{driver.cuda[0]}.{driver.cuda[1]}"
        yield Finding(
            "torch build",
            "error",
            f"torch {build.version} needs CUDA {wanted}, driver {driver.version} runs CUDA up to {have}",
            f"update the NVIDIA driver, or install torch for CUDA {driver.cuda[0]} (pytorch.org names the line)",
        )


def _probe(with_cuda: bool) -> dict[str, Any]:
    """What a fresh process that imports torch finds."""
    command = [sys.executable, "-c", _PROBE, *(["cuda"] if with_cuda else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_PROBE_TIMEOUT_S} s"}
    try:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"error": f"the process ended with code {done.returncode}"}
    return dict(facts)


def _probe_findings(driver: Driver, build: TorchBuild, facts: dict[str, Any]) -> Iterator[Finding]:
    reinstall = "pip install --force-reinstall torch"
    if "version" not in facts:
        yield Finding("torch", "error", f"import fails: {facts.get('error')}", reinstall)
        return
    if facts.get("cpu_product") != _PRODUCT:
        why = facts.get("error", "a wrong result")
        yield Finding("torch", "error", f"{facts['version']}: a small matrix product fails: {why}", reinstall)
        return
    yield Finding("torch", "ok", f"{facts['version']}, a matrix product on the CPU is right")
    if driver.has_gpu and build.cuda is not None:
        yield _cuda_finding(facts)


def _cuda_finding(facts: dict[str, Any]) -> Finding:
    devices = facts.get("devices") or []
    if devices and all(product == _PRODUCT for product in facts.get("cuda_product", [None])):
        return Finding("cuda", "ok", f"a matrix product is right on {', '.join(devices)}")
    why = facts.get("error") or ("no device is visible to torch" if not devices else "a wrong result")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    mend = "nvidia-smi   (is another process holding the GPU, or the driver older than torch's CUDA?)"
    if hidden is not None and not devices:
        mend = f"unset CUDA_VISIBLE_DEVICES   (it is {hidden!r})"
    return Finding("cuda", "error", f"there is a GPU and torch can't use it: {why}", mend)


def _compiler(driver: Driver) -> Iterator[Finding]:
    """Triton builds its launcher with the system's compiler and Python's headers; on a CPU nothing needs them."""
    level: Level = "error" if driver.has_gpu else "note"
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        yield Finding("compiler", level, "no C compiler (GPU kernels need one)", "sudo apt-get install -y gcc")
    else:
        yield Finding("compiler", "ok", compiler)
    if os.name == "posix" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        lack = "no C++ compiler: answers on a CPU go through torch, which is slower than what is compiled here"
        yield Finding("c++", "note", lack, "sudo apt-get install -y g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        yield Finding("headers", "ok", f"Python.h in {header.parent}")
    else:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        yield Finding("headers", level, "no Python.h (GPU kernels need it)", f"sudo apt-get install -y {package}")


def _triton(driver: Driver) -> Finding:
    if importlib.util.find_spec("triton") is not None:
        return Finding("triton", "ok", "installed")
    if driver.has_gpu:
        return Finding("triton", "error", "not installed, GPU kernels need it", "pip install 'tunesmith[gpu]'")
    return Finding("triton", "ok", "not installed, and not needed without a GPU")


def _packages() -> Iterator[Finding]:
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("packages", "error", f"not installed: {', '.join(missing)}", "pip install -e .")
    else:
        yield Finding("packages", "ok", "all that tunesmith requires are installed")


def _memory() -> Finding:
    import psutil

    available, total = min(int(psutil.virtual_memory().available), total_memory_bytes()), total_memory_bytes()
    detail = f"{format_bytes(available)} free of {format_bytes(total)}"
    if available < _SCARCE_MEMORY_BYTES:
        return Finding("memory", "warning", f"only {detail}", "close other programs, or pick a smaller model")
    return Finding("memory", "ok", detail)


def _disk(directory: Path) -> Iterator[Finding]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    for name, folder in {"disk": directory, "cache disk": cache}.items():
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        detail = f"{format_bytes(free)} free at {folder}"
        level: Level = "error" if free < _NO_DISK_BYTES else "warning" if free < _SCARCE_DISK_BYTES else "ok"
        mend = None if level == "ok" else f"du -xh -d1 {existing} | sort -h | tail   (shows what to remove)"
        yield Finding(name, level, detail, mend)
    if not os.access(directory, os.W_OK):
        yield Finding("disk", "error", f"{directory} can't be written to", f"sudo chown -R $USER {directory}")


def _cpu() -> Iterator[Finding]:
    cores, threads = usable_cores(), os.environ.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdecimal() and int(threads) > cores:
        yield Finding(
            "cpu",
            "warning",
            f"OMP_NUM_THREADS={threads} on {cores} cores: threads fight",
            f"export OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("cpu", "ok", f"{cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else ""))


def _shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if folder.is_dir() and (size := shutil.disk_usage(folder).total) < _SCARCE_SHARED_BYTES:
        detail = f"/dev/shm holds only {format_bytes(size)}: loading data in workers may fail"
        yield Finding("shared memory", "warning", detail, "docker run --shm-size=1g ...")


def _extras(driver: Driver) -> Iterator[Finding]:
    wanted = {extra: about for extra, about in _EXTRAS.items() if extra != "gpu" or driver.has_gpu}
    missing = [extra for extra, (module, _) in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        purposes = ", ".join(wanted[extra][1] for extra in missing)
        yield Finding("extras", "note", f"optional, not installed: {purposes}", _install_extras(missing))
    else:
        yield Finding("extras", "ok", "all optional packages are installed")


def _install_extras(extras: list[str]) -> str:
    return f"pip install 'tunesmith[{','.join(extras)}]'"
