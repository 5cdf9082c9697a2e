"""Requests made from the server's own OpenAPI document, valid ones and broken ones: none may be answered with a 5xx.

    python tests/long/schemathesis_campaign.py --cases 10000 --out benchmarks/results/serve-schemathesis-2026-01-01

`--cases` of all routes together, half of them negative, against `tunesmith serve builtin:tiny` (or --url). Routes that
take nothing have one case each, and the others share the rest. Answers are also held to the document: status, content
type, and the schema of the body; a request that the document forbids may not be taken. Exit codes: 0 nothing found, 1
something was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tunesmith.bench.serve.target import serve_command, started
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
SERVER_ARGUMENTS = ("--max-model-len", "64", "--allow-adapter-loading")
TIMEOUT_S = 60.0
MAX_FINDINGS = 40


@dataclass
class Found:
    """What a campaign has seen of one route, one kind of case."""

    route: str
    mode: str
    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    valid_after_all: int = 0
    server_errors: list[dict[str, Any]] = field(default_factory=list)
    not_as_documented: list[dict[str, Any]] = field(default_factory=list)

    last: requests.Response | None = None

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        plain = {name: value for name, value in self.__dict__.items() if name != "last"}
        return {**plain, "statuses": {str(code): n for code, n in sorted(self.statuses.items())}}


def fuzz(
    url: str, model: str, cases: int, *, seed_value: int = 0, headers: dict[str, str] | None = None
) -> list[Found]:
    """Send `cases` requests to each route of the server at `url`, valid and broken ones in turn. Returns: what came."""
    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers or {})
    found = []
    with requests.Session() as session:
        document = session.get(f"{url}/openapi.json", headers=headers, timeout=TIMEOUT_S).json()
        for result in schema.get_all_operations():
            operation = result.ok()
            each = 1 if _takes_nothing(operation) else cases
            for mode, count in ((GenerationMode.POSITIVE, each - each // 2), (GenerationMode.NEGATIVE, each // 2)):
                one = Found(operation.label, mode.value)
                found.append(one)
                _fuzz_route(operation, mode, count, one, session, model, seed_value, headers, document)
    return found


def _fuzz_route(
    operation: Any,
    mode: GenerationMode,
    count: int,
    found: Found,
    session: requests.Session,
    model: str,
    seed_value: int,
    headers: dict[str, str] | None,
    document: dict[str, Any],
) -> None:
    if count == 0:
        return
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except Exception as error:  # a route without parameters can't be broken
        found.not_as_documented.append({"case": None, "what": f"no cases: {str(error)[:200]}"})
        return

    @seed(seed_value)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def attempt(case: Any) -> None:
        if found.cases >= count:
            return
        found.cases += 1
        _name_the_model(case, mode, model, found.cases)
        _send(case, found, session, headers)
        if mode is GenerationMode.NEGATIVE and found.last is not None and found.last.status_code < 300:
            if is_allowed(document, case):
                found.valid_after_all += 1
            else:
                _keep(found.not_as_documented, case, "taken, though the document forbids it", found.last)

    try:
        attempt()
    except Exception as error:
        if type(error).__name__ not in ("Unsatisfiable", "InvalidArgument", "NoExamples"):
            raise


def _name_the_model(case: Any, mode: GenerationMode, model: str, number: int) -> None:
    """Three of four valid requests name the model that is there: all others would end at its name."""
    if mode is not GenerationMode.POSITIVE or not number % 4:
        return
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = model
    if "name" in (case.path_parameters or {}):
        case.path_parameters["name"] = model


def _takes_nothing(operation: Any) -> bool:
    """Whether all requests to a route are the same."""
    return not (operation.definition.raw.get("requestBody") or operation.definition.raw.get("parameters"))


def share(operations: list[Any], cases: int) -> int:
    """Cases of a route that takes something, so that there are `cases` of all together.

    A route without a body can't be sent a broken request: its valid ones count twice in the division.
    """
    parts = sum(_parts(operation) for operation in operations)
    alone = sum(_takes_nothing(operation) for operation in operations)
    return max(1, 2 * -(-(cases - alone) // max(1, parts)))


def _parts(operation: Any) -> int:
    """Of a route's valid and its broken cases, how many kinds there are."""
    return 0 if _takes_nothing(operation) else 2 if operation.definition.raw.get("requestBody") else 1


def is_allowed(document: dict[str, Any], case: Any) -> bool:
    """Whether the document allows a case's body: what is broken in one variant may be right in another."""
    operation = document["paths"][case.operation.path][case.method.lower()]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    return bool(jsonschema.Draft202012Validator({**document, **schema}).is_valid(case.body))


def _send(case: Any, found: Found, session: requests.Session, headers: dict[str, str] | None) -> None:
    found.last = None
    try:
        response = case.call(session=session, headers=headers, timeout=TIMEOUT_S)
    except requests.exceptions.RequestException as error:
        _keep(found.server_errors, case, f"{type(error).__name__}: {error}", None)
        return
    found.statuses[response.status_code] += 1
    found.last = response
    if response.status_code >= 500:
        _keep(found.server_errors, case, f"status {response.status_code}", response)
        return
    try:
        case.validate_response(response, checks=CHECKS)
    except (Failure, FailureGroup) as failure:
        causes = getattr(failure, "exceptions", [failure])
        _keep(found.not_as_documented, case, "; ".join(str(cause) for cause in causes), response)


def _keep(target: list[dict[str, Any]], case: Any, what: str, response: Any) -> None:
    if len(target) < MAX_FINDINGS:
        body = None if response is None else response.text[:300]
        # Not the curl command: that filters whatever is called a token.
        sent = json.dumps(case.body, default=str)[:2000]
        target.append({"case": f"{case.method} {case.formatted_path} {sent}", "what": what[:400], "answer": body})


def summarise(found: list[Found], duration_s: float) -> dict[str, Any]:
    """The campaign as plain data."""
    errors = sum(len(one.server_errors) for one in found)
    undocumented = sum(len([item for item in one.not_as_documented if item["case"]]) for one in found)
    return {
        "schema": "tunesmith.schemathesis",
        "schema_version": 1,
        "cases": sum(one.cases for one in found),
        "server_errors": errors,
        "not_as_documented": undocumented,
        "passed": errors == 0 and undocumented == 0,
        "routes": [one.plain() for one in found],
        "duration_s": duration_s,
        "schemathesis": schemathesis.__version__,
        "environment": environment_fingerprint(),
    }


@contextmanager
def _server(url: str | None) -> Iterator[tuple[str, str]]:
    """A server's URL and its model."""
    if url is not None:
        yield url, "builtin:tiny"
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with started(serve_command("builtin:tiny", SERVER_ARGUMENTS), log=log, timeout_s=120) as target:
            yield target.url, target.model
            still = requests.get(f"{target.url}/health", timeout=10)
            if still.status_code != 200:
                raise SystemExit(f"the server is not healthy after the campaign: {still.status_code} {still.text}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that is up; else one is started")
    parser.add_argument("--out", type=Path, required=True, help="a folder for schemathesis.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    began = time.monotonic()
    with _server(arguments.url) as (url, model):
        operations = [
            result.ok() for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()
        ]
        found = fuzz(url, model, share(operations, arguments.cases), seed_value=arguments.seed)
    result = summarise(found, time.monotonic() - began)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(arguments.out / "schemathesis.json", result)
    for one in result["routes"]:
        print(f"{one['route']:40s} {one['mode']:9s} {one['cases']:6d} cases  {json.dumps(one['statuses'])}")
        for item in [*one["server_errors"], *one["not_as_documented"]][:4]:
            print(f"    {item['what'][:300]}\n    {(item['case'] or '')[:600]}")
    errors, undocumented = result["server_errors"], result["not_as_documented"]
    print(f"{result['cases']} cases, {errors} server errors, {undocumented} not as documented")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
