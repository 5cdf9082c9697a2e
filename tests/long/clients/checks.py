"""How a client's script says what passed: one line of JSON for every check. Standard library only."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

Check = Callable[[], Any]


def run(checks: dict[str, Check]) -> None:
    """Run every check; what it returns is shown, what it raises is its failure. Exits with 1 if any failed."""
    failed = 0
    for name, check in checks.items():
        try:
            detail, passed = check(), True
        except Exception as error:
            traceback.print_exc()
            detail, passed = f"{type(error).__name__}: {str(error)[:400]}", False
        failed += not passed
        sys.stdout.write(json.dumps({"check": name, "passed": passed, "detail": str(detail)[:400]}) + "\n")
        sys.stdout.flush()
    sys.exit(1 if failed else 0)


def expect(condition: object, what: object) -> None:
    """Raise unless the condition holds."""
    if not condition:
        raise AssertionError(what)
