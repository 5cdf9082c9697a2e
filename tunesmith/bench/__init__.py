"""Measure: see docs/map.md. Calling the package calls `tunesmith.bench.matrix.bench`."""

from tunesmith.callable_package import make_callable

make_callable(__name__, "tunesmith.bench.matrix", "bench")
