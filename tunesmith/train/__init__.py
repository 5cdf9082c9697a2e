"""Train: see docs/map.md. Calling the package calls `tunesmith.train.run.train`."""

from tunesmith.callable_package import make_callable

make_callable(__name__, "tunesmith.train.run", "train")
