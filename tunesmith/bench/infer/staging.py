"""The runners of peers as a folder of their own, for a Python that has no tunesmith and must not get ours' packages.

Only this package's runners and protocol are copied, under their own names, beside empty packages above them: the
folder on PYTHONPATH brings `tunesmith.bench.infer.peers.vllm` and nothing else of this installation.
"""

from __future__ import annotations

import shutil
from pathlib import Path

_HERE = Path(__file__).parent


def stage_runners(folder: Path) -> Path:
    """Copy what peers' processes import. Returns: the folder to put on PYTHONPATH."""
    package = folder / "tunesmith" / "bench" / "infer"
    (package / "peers").mkdir(parents=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    shutil.copy(_HERE / "protocol.py", package)
    for file in (_HERE / "peers").glob("*.py"):
        shutil.copy(file, package / "peers")
    return folder
