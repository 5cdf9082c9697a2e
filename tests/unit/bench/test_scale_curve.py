"""Curves, what limits them, and projections, from cells written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.arch import config_from_dict
from tunesmith.bench.scale_curve import curve_of, curves_json, limit_of, projection_json
from tunesmith.bench.scale_summary import formats_of, layout_of, summarise
from tunesmith.cost.collectives import Link
from tunesmith.cost.shards import Formats, Layout
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe

CONFIG = config_from_dict(
    {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


def _cell(gpus: int, step_s: float, mode: str = "weak", **changes: Any) -> dict[str, Any]:
    parts = {"exposed_s": 0.0, "data_s": 0.01, "optimizer_s": 0.1, **changes.pop("parts", {})}
    parts["compute_s"] = step_s - sum(parts.values())
    micro_batches = gpus if mode == "weak" else 4
    summary = {
        "step_s": step_s,
        "steps_s": [step_s, step_s * 1.01, step_s * 0.99],
        "tokens_per_step": 1000 * micro_batches,
        "parts": parts,
        "waiting_s": 0.0,
        "idle_s": 0.0,
        "link": {"bandwidth_bytes_per_s": 1e9, "latency_s": 1e-5} if gpus > 1 else None,
        "layout": {"strategy": "zero3", "data": gpus, "tensor": 1, "pipeline": 1, "blocks": []},
        **changes,
    }
    name = f"{mode}-{gpus}"
    return {
        "name": name,
        "mode": mode,
        "gpus": gpus,
        "micro_batches": micro_batches,
        "status": "ok",
        "summary": summary,
    }


def test_weak_efficiency_is_speed_per_gpu() -> None:
    points = curve_of([_cell(4, 1.25, parts={"exposed_s": 0.2}), _cell(1, 1.0)], "weak")
    assert [point.gpus for point in points] == [1, 4]
    assert [point.efficiency_ratio for point in points] == pytest.approx([1.0, 0.8])
    assert points[1].tokens_per_gpu_s == pytest.approx(800)
    assert points[1].parts.step_s == pytest.approx(points[1].step_s)


def test_strong_efficiency_is_speed_over_gpus() -> None:
    points = curve_of([_cell(1, 4.0, "strong"), _cell(2, 2.5, "strong"), _cell(4, 1.25, "strong")], "strong")
    assert [point.efficiency_ratio for point in points] == pytest.approx([1.0, 0.8, 0.8])


def test_repeats_are_pooled() -> None:
    first, second = _cell(1, 1.0), _cell(1, 1.2)
    (point,) = curve_of([first, second], "weak")
    assert point.step_s == pytest.approx((1.01 + 1.188) / 2)
    assert point.parts.step_s == pytest.approx(point.step_s)


def test_failed_cells_are_no_points() -> None:
    failed = {"mode": "weak", "gpus": 1, "status": "out_of_memory", "summary": None}
    points = curve_of([failed, _cell(2, 1.0), _cell(4, 1.0)], "weak")
    assert [(point.gpus, point.efficiency_ratio) for point in points] == [(2, 1.0), (4, 1.0)]
    assert curve_of([failed], "weak") == []
    assert curves_json([failed]) == {"curves": {"weak": []}, "limits": {}}


@pytest.mark.parametrize(
    ("last", "expected", "lost_s"),
    [
        (_cell(4, 1.005), "none", 0.0),
        (_cell(4, 1.2, parts={"exposed_s": 0.15}), "communication", 0.15),
        (_cell(4, 1.2, parts={"exposed_s": 0.15}, waiting_s=0.1), "stragglers", 0.15),
        (_cell(4, 1.2, parts={"data_s": 0.2}), "data", 0.19),
        (_cell(4, 1.2, parts={"optimizer_s": 0.3}), "optimizer", 0.2),
        (_cell(4, 1.2), "compute", 0.2),
        (_cell(4, 1.2, idle_s=0.15), "host", 0.2),
    ],
)
def test_what_limits_weak_scaling(last: dict[str, Any], expected: str, lost_s: float) -> None:
    limit, lost = limit_of(curve_of([_cell(1, 1.0), last], "weak"))
    assert limit == expected
    assert lost == pytest.approx(lost_s)


def test_strong_scaling_is_compared_with_divided_parts() -> None:
    """An optimiser that takes as long on four as on one is what limits: 0.1 s instead of a quarter of it."""
    limit, lost = limit_of(curve_of([_cell(1, 4.1, "strong"), _cell(4, 1.0975 + 0.01, "strong")], "strong"))
    assert limit == "optimizer"
    assert lost == pytest.approx(0.075)


def _resolved(**sections: dict[str, Any]) -> Recipe:
    base: dict[str, dict[str, Any]] = {
        "model": {"dtype": "float32"},
        "train": {"precision": "bfloat16", "master_weights": "float32"},
        "parallel": {"strategy": "zero3"},
    }
    return recipe_from_mapping({key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}})


def test_a_projection_starts_from_what_was_measured() -> None:
    """A fast network: what is projected for eight is what four measured, but for the update of a smaller share."""
    cells = [_cell(1, 1.0), _cell(2, 1.0), _cell(4, 1.0)]
    recipe = _resolved()
    found = projection_json(cells, recipe, CONFIG, Link(1e15, 0.0), per_node=4, nodes=2)
    assert found["cluster"]["per_node"] == 4
    assert found["nodes"] == 2
    weak = found["modes"]["weak"]
    assert weak["hidden_ratio"] <= 1
    (point,) = weak["points"]
    assert point["gpus"] == 8
    assert point["is_projected"]
    assert point["step_s"] == pytest.approx(1.0 - 0.05, rel=0.02)


def test_a_slow_network_shows() -> None:
    cells = [_cell(1, 1.0), _cell(2, 1.0)]
    fast, slow = (
        projection_json(cells, _resolved(), CONFIG, Link(rate, 0.0), per_node=2, nodes=4)["modes"]["weak"]["points"][-1]
        for rate in (1e12, 1e5)
    )
    assert slow["step_s"] > 2 * fast["step_s"]
    assert slow["efficiency_ratio"] < fast["efficiency_ratio"]


def test_no_projection_has_a_reason() -> None:
    link = Link(1e9, 0.0)
    assert "model" in projection_json([_cell(2, 1.0)], _resolved(), None, link, 2, 2)["reason"]
    assert "link" in projection_json([_cell(1, 1.0)], _resolved(), CONFIG, link, 2, 2)["reason"]


def test_formats_and_layout_of_a_resolved_recipe() -> None:
    assert formats_of(_resolved()) == Formats("float32", "float32", "bfloat16")
    pure = _resolved(model={"dtype": "bfloat16"}, train={"master_weights": "compute"})
    assert formats_of(pure) == Formats("bfloat16", "bfloat16", "bfloat16")
    assert layout_of(_resolved(), {"pp": 1, "dp": 4, "tp": 2}, CONFIG) == Layout("zero3", 4, 2, 1)
    assert layout_of(_resolved(), {"pp": 1, "dp": 1, "tp": 1}, CONFIG) == Layout()
    assert sum(layout_of(_resolved(), {"pp": 2, "dp": 1, "tp": 1}, CONFIG).blocks) == 4


def _rank(rank: int, seconds: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "rank": rank,
        "place": {"pp": 0, "dp": rank, "tp": 0},
        "mesh": {"pp": 1, "dp": 2, "tp": 1},
        "device": {"type": "cuda", "name": "A chip"},
        "steps_s": seconds,
        "losses": [2.0, 1.9],
        "data_wait_s": 0.001,
        "optimizer_s": 0.05,
        "split": {"exposed_ratio": 0.1, "communication_ratio": 0.4, "idle_ratio": 0.02, "traced_s": 3.0},
        "work": {"steps": 3, "tokens": 6000},
        "states": {"weights_bytes": 300, "adapters_bytes": 0, "gradients_bytes": 300, "optimizer_bytes": 600},
        "memory": {"allocated_peak_bytes": 1000 + rank, "allocated_at_rest_bytes": None},
        "links": [(4, 2e-5), (10**6, 1.02e-3)],
        "setup_s": 1.0 + rank,
        **changes,
    }


def test_processes_as_one() -> None:
    late = {"exposed_ratio": 0.3, "communication_ratio": 0.6, "idle_ratio": 0.04, "traced_s": 3.0}
    ranks = [_rank(0, [1.0, 1.0, 1.0]), _rank(1, [1.0, 1.2, 0.9], split=late, data_wait_s=0.002)]
    found = summarise(ranks, _resolved(), None)
    assert found["steps_s"] == [1.0, 1.2, 1.0]
    assert (found["step_s"], found["tokens_per_step"], found["tokens_per_s"]) == (1.0, 2000, 2000.0)
    assert found["parts"]["exposed_s"] == pytest.approx(0.2)
    assert found["parts"]["data_s"] == 0.002
    assert found["parts"]["compute_s"] == pytest.approx(1.0 - 0.2 - 0.002 - 0.05)
    assert found["waiting_s"] == pytest.approx(0.1)
    assert found["idle_s"] == pytest.approx(0.03)
    assert found["memory"] == {"allocated_peak_bytes": 1001, "allocated_at_rest_bytes": None}
    assert found["link"]["bandwidth_bytes_per_s"] == pytest.approx(1e9)
    assert found["link"]["latency_s"] == pytest.approx(1e-5)
    assert found["states"]["difference_percent"] is None
    assert found["states"]["measured"]["total_bytes"] == 1200


def test_states_that_differ_from_the_formula_show() -> None:
    """Sixteen bytes a parameter and half of them each: what a process holds too much is the worst difference."""
    held = {"weights_bytes": 0, "adapters_bytes": 0, "gradients_bytes": 0, "optimizer_bytes": 0}
    from tunesmith.cost.params import count_parameters

    half = 16 * count_parameters(CONFIG).total // 2
    ranks = [_rank(0, [1.0], states={**held, "weights_bytes": half})]
    ranks.append(_rank(1, [1.0], states={**held, "weights_bytes": half * 110 // 100}))
    found = summarise(ranks, _resolved(method={"kind": "full"}), CONFIG)["states"]
    assert found["difference_percent"] == pytest.approx(10.0, abs=0.01)
    assert found["ranks"][0]["difference_percent"] == pytest.approx(0.0)
    assert found["formula"]["total_bytes"] == half


def test_an_optimiser_that_was_not_seen_is_in_computing() -> None:
    found = summarise([_rank(0, [1.0], optimizer_s=None, states=None)], _resolved(), CONFIG)
    assert found["parts"]["optimizer_s"] == 0.0
    assert found["parts"]["exposed_s"] == 0.0
    assert found["states"] is None
