"""What torch imports for a compiler that is not used stays out, and results are the same."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tunesmith.model.uncompiled import gradients, spare_compiler

_STEP = """
import sys, torch
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.optimizers import make_optimizer
from tunesmith.verify.kernels import _results
for kind in ("adamw", "sgd", "adamw8bit"):
    layer = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(layer.named_parameters(), TrainSection(optimizer=kind, learning_rate=0.1))
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(before, layer.weight), kind
_results(torch.square, [torch.ones(3)])
print([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules])
"""


def test_a_step_does_not_import_the_compiler(torch_forks: Callable[..., str]) -> None:
    printed = torch_forks(_STEP)
    assert printed.strip() == "[]"


def test_a_decoder_is_filled_without_sympy(torch_forks: Callable[..., str]) -> None:
    code = (
        "import sys; from tunesmith.checkpoint.load import load_model\n"
        "model = load_model('builtin:tiny', device='cpu', dtype='float32', weights='random')\n"
        "print('sympy' in sys.modules, all(p.device.type == 'cpu' for p in model.parameters()))"
    )
    printed = torch_forks(code)
    assert printed.strip() == "False True"


def test_gradients_are_those_of_autograd() -> None:
    x, unused = torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    direction = torch.randn(3, 4)
    found = gradients(x.exp(), [x, unused], direction)
    (expected,) = torch.autograd.grad(x.exp(), [x], direction)
    assert found[1] is None
    assert found[0] is not None and torch.equal(found[0], expected)


def test_spared_functions_do_what_they_did() -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
    spare_compiler(torch.optim.Optimizer.zero_grad, torch.optim.Optimizer.state_dict, len)
    optimizer.zero_grad()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 1.0


def test_modules_that_tell_the_compiler_come_without_it(torch_forks: Callable[..., str]) -> None:
    code = (
        "import sys, torch; from tunesmith.model.uncompiled import import_uncompiled\n"
        "module = import_uncompiled('torch.nn.attention.varlen')\n"
        "print(callable(module.varlen_attn), 'torch._dynamo' in sys.modules, '_dynamo' in vars(torch))\n"
        "import torch._dynamo\n"
        "print(callable(torch._dynamo.disallow_in_graph), import_uncompiled('torch.nn.attention.varlen') is module)\n"
    )
    printed = torch_forks(code)
    assert printed.split() == ["True", "False", "False", "True", "True"]


def test_operators_are_called_without_the_compiler(torch_forks: Callable[..., str]) -> None:
    """The first call of any of them imported it: more than a second of a GPU's first step."""
    code = (
        "import sys, torch; from tunesmith.model.uncompiled import import_kernels, spare_operators\n"
        "@torch.library.custom_op('probe::double', mutates_args=())\n"
        "def double(x: torch.Tensor) -> torch.Tensor:\n"
        "    return x * 2\n"
        "double.register_autograd(lambda ctx, grad: grad * 2)\n"
        "import_kernels()\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "double(x).sum().backward()\n"
        "print(x.grad.tolist(), [name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n"
    )
    printed = torch_forks(code)
    assert printed.strip() == "[2.0, 2.0, 2.0] []"


def test_determinism_is_decided_without_the_compiler(torch_forks: Callable[..., str]) -> None:
    """torch's own switch imports all of it: up to four seconds of a start-up on a GPU."""
    code = (
        "import sys, torch; from tunesmith.model.uncompiled import decide_determinism\n"
        "for wanted in (True, False):\n"
        "    decide_determinism(wanted)\n"
        "    print(torch.are_deterministic_algorithms_enabled(), end=' ')\n"
        "    print(torch.is_deterministic_algorithms_warn_only_enabled())\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])\n"
    )
    printed = torch_forks(code)
    assert printed.splitlines() == ["True False", "False False", "[]"]
