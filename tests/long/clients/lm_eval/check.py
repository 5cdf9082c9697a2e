"""lm-eval's local-completions and local-chat-completions against a server: check.py BASE_URL MODEL API_KEY TOKENIZER.

The tasks are made here, so that nothing is downloaded: choices by log-likelihood, and answers that are generated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checks import expect, run

BASE_URL, MODEL, KEY, TOKENIZER = sys.argv[1:5]
ROWS = [
    {"question": "A red coat costs", "choices": [" 20", " banana"], "label": 0},
    {"question": "Where is my", "choices": [" order", " 7"], "label": 0},
    {"question": "The box is", "choices": [" small", " the the"], "label": 0},
]
COMMON = (
    "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {rows}\ntest_split: test\n"
    'doc_to_text: "{{{{question}}}}"\ntarget_delimiter: ""\n'
)
CHOICE = (
    'task: shop_choice\noutput_type: multiple_choice\ndoc_to_choice: "{{{{choices}}}}"\ndoc_to_target: label\n'
    "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
)
SAY = (
    'task: shop_say\noutput_type: generate_until\ndoc_to_target: "{{{{choices[label]}}}}"\n'
    'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\n  temperature: 0.0\n'
    "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
)


def harness(folder: Path, kind: str, route: str, tasks: str, *more: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Run the harness. Returns: its results, and the logged samples of each task."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("say", SAY)):
        (folder / f"{name}.yaml").write_text((COMMON + text).format(rows=rows), encoding="utf-8")
    arguments = f"model={MODEL},base_url={BASE_URL}/{route},tokenizer_backend=huggingface,tokenizer={TOKENIZER}"
    out = folder / "out"
    command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", kind, "--include_path", str(folder)]
    command += ["--model_args", f"{arguments},num_concurrent=2,max_retries=1", "--tasks", tasks, "--log_samples"]
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [*command, "--output_path", str(out), *more], env=environment, cwd=folder, capture_output=True, text=True
    )
    expect(done.returncode == 0, done.stderr[-800:])
    results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    samples = {
        file.stem.split("_20")[0].removeprefix("samples_"): [
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in out.rglob("samples_*.jsonl")
    }
    return results, samples


def log_likelihood(prompt: str, continuation: str) -> float:
    """The server's own log-probability of a continuation, by echo."""
    body = {
        "model": MODEL,
        "prompt": prompt + continuation,
        "max_tokens": 1,
        "echo": True,
        "logprobs": 1,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{BASE_URL}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)["choices"][0]["logprobs"]
    pairs = zip(found["text_offset"], found["token_logprobs"], strict=True)
    whole = len(prompt + continuation)
    return sum(value for offset, value in pairs if len(prompt) <= offset < whole and value is not None)


def completions() -> str:
    with tempfile.TemporaryDirectory() as folder:
        results, samples = harness(Path(folder), "local-completions", "completions", "shop_choice,shop_say")
    for sample in samples["shop_choice"]:
        for choice, (told, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            own = log_likelihood(sample["doc"]["question"], choice)
            expect(abs(float(told) - own) < 0.02, (choice, told, own))
    expect(all(sample["resps"][0][0] for sample in samples["shop_say"]), samples["shop_say"])
    return f"accuracy {results['shop_choice']['acc,none']:.2f}, log-likelihoods equal the server's echo"


def chat_completions() -> str:
    with tempfile.TemporaryDirectory() as folder:
        _, samples = harness(
            Path(folder), "local-chat-completions", "chat/completions", "shop_say", "--apply_chat_template"
        )
    expect(len(samples["shop_say"]) == len(ROWS), samples)
    expect(all(sample["resps"][0][0] for sample in samples["shop_say"]), samples["shop_say"])
    return repr(samples["shop_say"][0]["resps"][0][0])


if __name__ == "__main__":
    run({"local-completions": completions, "local-chat-completions": chat_completions})
