"""guidellm against a server: check.py BASE_URL MODEL API_KEY TOKENIZER."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checks import expect, run

BASE_URL, MODEL, KEY, TOKENIZER = sys.argv[1:5]
REQUESTS, OUTPUT_TOKENS = 8, 16


def measure(profile: str) -> dict[str, Any]:
    """One benchmark of guidellm's. Returns: its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        backend = f"kind=openai_http,target={BASE_URL.removesuffix('/v1')},model={MODEL},api_key={KEY}"
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--backend", backend, "--profile", profile]
        command += ["--constraint", f"kind=max_requests,count={REQUESTS}", "--disable-progress"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        done = subprocess.run(
            [*command, "--output", "kind=json,path=out.json"],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        expect(done.returncode == 0, done.stderr[-800:])
        report = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
    return dict(report["benchmarks"][0]["metrics"])


def checked(profile: str) -> str:
    """Every request succeeded, with as many tokens as asked for."""
    found = measure(profile)
    totals = found["request_totals"]
    expect(totals["errored"] == 0 and totals["successful"] >= REQUESTS - 1, totals)
    tokens = found["output_token_count"]["successful"]
    expect(tokens["min"] == tokens["max"] == OUTPUT_TOKENS, tokens)
    first = found["time_to_first_token_ms"]["successful"]["median"]
    return f"{totals['successful']} requests, TTFT {first:.1f} ms at the median"


if __name__ == "__main__":
    run(
        {
            "concurrent": lambda: checked("kind=concurrent,streams=2"),
            "poisson": lambda: checked("kind=poisson,rate=4"),
        }
    )
