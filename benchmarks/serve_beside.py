"""tunesmith and vLLM over HTTP, the same requests at the highest rate: `python benchmarks/serve_beside.py CONFIG_DIR`

    CONFIG_DIR             a folder with a config.json: weights are random, written once and loaded by both
    --tokenizer DIR        its tokenizer's files
    --quantize fp8         both quantise as they load (vLLM's --quantization of the same name)
    --peer-python PYTHON   one that has vLLM; or --peer-path DIR, a folder of its packages for this Python
    --rounds 2             of both; who goes first alternates
    --rate inf             requests a second, as 4,16,inf: 256 requests, prompts and answers of 100 to 1,024 tokens
    --out DIR              a run directory of `tunesmith bench serve` for every round of each

Every run prints one JSON line: output tokens per second, time to the first token, time per token, seconds to start.
The last line of each rate compares medians over the rounds. Without a peer only tunesmith runs. The weights lie in
--scratch until the end (a 7B takes 15 GB; /dev/shm spares the disk).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
COMPARED = ("output_tokens_per_s", "ttft_p50_s", "ttft_p99_s")


def write_checkpoint(config: Path, tokenizer: Path, folder: Path, device: str) -> None:
    """Random weights in bfloat16, and the tokenizer's files, in `folder`."""
    from tunesmith.checkpoint.load import load_model
    from tunesmith.checkpoint.save import save_decoder
    from tunesmith.model.decoder import Decoder

    model = load_model(config, dtype="bfloat16", device=device, weights="random")
    assert isinstance(model, Decoder), "a family of our own decoder"
    save_decoder(model, folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)


@dataclass(frozen=True)
class Asked:
    """What is measured, of the command line."""

    model: Path
    quantize: str | None
    max_model_len: int
    load: Sequence[str]
    peer_python: str | None
    peer_path: Path | None
    peer_args: str
    serve_args: str

    def ours(self) -> list[str]:
        """Words of `tunesmith bench serve` for our server."""
        words = ["--dtype", "bfloat16", "--max-model-len", str(self.max_model_len)]
        words += ["--quantization", self.quantize] if self.quantize else []
        return [str(self.model), "--serve-args", " ".join([*words, *shlex.split(self.serve_args)])]

    def peers(self) -> list[str]:
        """The same for vLLM."""
        paths = [] if self.peer_path is None else ["env", f"PYTHONPATH={self.peer_path}"]
        words = [*paths, self.peer_python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", str(self.model), "--port", "{port}", "--dtype", "bfloat16"]
        words += ["--max-model-len", str(self.max_model_len)]
        words += ["--quantization", self.quantize] if self.quantize else []
        return ["--start", shlex.join([*words, *shlex.split(self.peer_args)])]

    def command(self, name: str, output: Path) -> list[str]:
        """One run of `tunesmith bench serve`."""
        of = self.ours() if name == "tunesmith" else self.peers()
        words = [sys.executable, "-m", "tunesmith", "bench", "serve", *of, *self.load]
        return [*words, "--name", name, "--no-report", "--output", str(output)]


def line_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one load, or why there are none."""
    found: dict[str, Any] = {"load": cell["name"], "status": cell["status"]}
    if cell["status"] != "ok":
        return {**found, "reason": cell["reason"]}
    measures = cell["measures"]
    found["output_tokens_per_s"] = round(measures["output_tokens_per_s"], 1)
    for key, part in (("ttft", "ttft_s"), ("tpot", "tpot_s")):
        # Answers that came in one piece have no time per token.
        known = {at: (measures.get(part) or {}).get(at) for at in ("p50", "p99")}
        found |= {f"{key}_{at}_s": round(value, 4) for at, value in known.items() if value is not None}
    found |= {"completed": measures["completed"], "errors": measures["errors"]}
    return {**found, "start_s": cell["target"].get("start_s"), "tokens_per_chunk": measures.get("tokens_per_chunk")}


def lines_of(output: Path) -> list[dict[str, Any]]:
    """One for each load of a run directory."""
    cells = sorted((output / "cells").glob("*.json"))
    return [line_of(json.loads(cell.read_text(encoding="utf-8"))) for cell in cells]


def medians(lines: Sequence[Mapping[str, Any]], load: str) -> dict[str, Any]:
    """Over the rounds, by server; ratio: ours over the peer's."""
    found: dict[str, Any] = {"compared": load}
    for key in COMPARED:
        of: dict[str, list[float]] = {}
        for line in lines:
            if line.get("load") == load and line.get(key) is not None:
                of.setdefault(line["server"], []).append(line[key])
        values = {name: statistics.median(some) for name, some in of.items()}
        found[key] = {name: round(value, 4) for name, value in values.items()}
        if len(values) == 2 and values["vllm"]:
            found[key]["ratio"] = round(values["tunesmith"] / values["vllm"], 3)
    return found


def servers(has_peer: bool, number: int) -> list[str]:
    """Who runs in a round, in order."""
    names = ["tunesmith", "vllm"] if has_peer else ["tunesmith"]
    return names if number % 2 == 0 else names[::-1]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quantize")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--peer-args", default="", help="more options of vLLM's server, in one text")
    parser.add_argument("--serve-args", default="", help="more options of tunesmith serve, in one text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rate", default="inf")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--prompt-tokens", default="100..1024")
    parser.add_argument("--output-tokens", default="100..1024")
    parser.add_argument("--client-processes", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    config = json.loads((asked.config / "config.json").read_text(encoding="utf-8"))
    load = ["--rate", asked.rate, "--num", str(asked.num), "--prompt-tokens", asked.prompt_tokens]
    load += ["--output-tokens", asked.output_tokens, "--client-processes", str(asked.client_processes)]
    # Ids of ordinary text, the same for both: a tokenizer's last ids are reserved.
    load += ["--num-ids", str(int(config["vocab_size"] * 0.95)), "--max-model-len", str(asked.max_model_len)]
    has_peer = bool(asked.peer_python or asked.peer_path)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        model = Path(folder) / asked.config.resolve().name
        # In a process of its own: this one holds no memory of the device that the servers want.
        made = [sys.executable, __file__, "write", *map(str, (asked.config, asked.tokenizer, model, asked.device))]
        subprocess.run(made, check=True)
        what = Asked(
            model,
            asked.quantize,
            asked.max_model_len,
            load,
            asked.peer_python,
            asked.peer_path,
            asked.peer_args,
            asked.serve_args,
        )
        for number in range(asked.rounds):
            for name in servers(has_peer, number):
                output = asked.out / f"{name}-{number}"
                done = subprocess.run(what.command(name, output), cwd=ROOT, stdout=sys.stderr, env=dict(os.environ))
                found = [{"server": name, "round": number, **line} for line in lines_of(output)]
                found = found or [{"server": name, "round": number, "status": "failed", "code": done.returncode}]
                lines += found
                for line in found:
                    print(json.dumps(line), flush=True)
    for load_name in dict.fromkeys(line["load"] for line in lines if "load" in line):
        print(json.dumps(medians(lines, load_name)), flush=True)
    return 0 if all(line["status"] == "ok" for line in lines) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
    else:
        sys.exit(main())
