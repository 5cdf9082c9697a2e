"""NF4 and the 8-bit AdamW: passes as they are, and fails where a fault is planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tunesmith.arch import ModelConfig
from tunesmith.kernels.nf4 import quantize_nf4
from tunesmith.kernels.nf4_weight import NF4Weight
from tunesmith.recipe.schema import MethodSection, TrainSection
from tunesmith.train.adam8bit import AdamW8bit
from tunesmith.verify import quantisers
from tunesmith.verify.check import run_check
from tunesmith.verify.kernels import Shapes
from tunesmith.verify.quantisers import adamw8bit_update, nf4_quantiser

CPU = torch.device("cpu")


def _shapes(hidden_size: int) -> Shapes:
    config = ModelConfig(
        family="llama", vocab_size=64, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, norm_eps=1e-5,
    )  # fmt: skip
    return Shapes(config, 16, 64)


def _nf4_passes(hidden_size: int = 200, double: bool = True) -> bool:
    method = MethodSection(kind="qlora", double_quantisation=double)
    return run_check("x", lambda: nf4_quantiser(_shapes(hidden_size), method, CPU, torch.bfloat16)).passed


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("hidden_size", [8, 200, 289, 1024])
def test_nf4_is_the_nearest_code(hidden_size: int, double: bool) -> None:
    assert _nf4_passes(hidden_size, double)


def _bytes_swapped(weight: NF4Weight) -> NF4Weight:
    return replace(weight, codes=(weight.codes >> 4) | (weight.codes << 4))


def _one_code_off(weight: NF4Weight) -> NF4Weight:
    codes = weight.codes.clone()
    codes.view(-1)[-1] ^= 16
    return replace(weight, codes=codes)


def _one_scale_off(weight: NF4Weight) -> NF4Weight:
    scales = weight.scales.clone()
    scales[-1] = scales[-1] + 3 if scales.dtype == torch.uint8 else scales[-1] * 1.01
    return replace(weight, scales=scales)


def _not_a_number(weight: NF4Weight) -> NF4Weight:
    return replace(weight, offset=None if weight.offset is None else weight.offset * torch.nan)


@pytest.mark.parametrize("fault", [_bytes_swapped, _one_code_off, _one_scale_off, _not_a_number])
def test_faults_of_the_nf4_quantiser_are_caught(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisers, "quantize_nf4", lambda weight, double: fault(quantize_nf4(weight, double)))
    assert not _nf4_passes()


@pytest.mark.parametrize("changes", [{}, {"beta1": 0.5, "eps": 1e-6, "weight_decay": 0.1}])
def test_the_8_bit_update_is_adamws(changes: dict[str, float]) -> None:
    train = TrainSection(optimizer="adamw8bit").model_copy(update=changes)
    assert run_check("x", lambda: adamw8bit_update(train, CPU)).passed


class _CodesOff(AdamW8bit):
    def step(self, closure: Any = None) -> None:
        super().step()
        for state in self.state.values():
            state["exp_avg_codes"][7] -= 1


class _SecondMomentLost(AdamW8bit):
    """As if small second moments were rounded to zero, which once made steps of thousands of learning rates."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for state in self.state.values():
            state["exp_avg_sq_codes"][state["exp_avg_sq_codes"] == 1] = 0
            state["exp_avg_sq_codes"][0] = 0


class _OneScaleForAll(AdamW8bit):
    def step(self, closure: Any = None) -> None:
        super().step()
        for state in self.state.values():
            state["exp_avg_absmax"][:] = state["exp_avg_absmax"].max()


class _CoupledDecay(AdamW8bit):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.add_(parameter.detach(), alpha=1e-3)
        super().step()


class _Miscounted(AdamW8bit):
    def step(self, closure: Any = None) -> None:
        for state in self.state.values():
            state["step"] += 1
        super().step()


class _NotANumber(AdamW8bit):
    def step(self, closure: Any = None) -> None:
        super().step()
        for state in self.state.values():
            state["exp_avg_sq_absmax"][-1] = torch.nan


FAULTS = (_CodesOff, _SecondMomentLost, _OneScaleForAll, _CoupledDecay, _Miscounted, _NotANumber)


@pytest.mark.parametrize("faulty", FAULTS)
def test_faults_of_the_8_bit_update_are_caught(faulty: type[AdamW8bit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisers, "AdamW8bit", faulty)
    assert not run_check("x", lambda: adamw8bit_update(TrainSection(), CPU)).passed
