"""Which engine updates a run's weights: the native one, or DeepSpeed; and what both are asked."""

from __future__ import annotations

from torch import Tensor, nn

from tunesmith.parallel.apply import spread_out
from tunesmith.parallel.deepspeed_engine import ZeroEngine
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.pipeline import Piped
from tunesmith.parallel.spread import Spread
from tunesmith.recipe.schema import Recipe
from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_updater
from tunesmith.train.resolve import DTYPES
from tunesmith.train.update import Batch, LossFunction, Updater
from tunesmith.units import ceil_div

AnySpread = Spread | ZeroEngine
AnyUpdater = Updater | DeepSpeedUpdater


def spread_and_updater(
    recipe: Recipe, module: nn.Module, total_steps: int, mesh: Mesh, packs: int
) -> tuple[AnySpread, AnyUpdater]:
    """How a resolved recipe's model is spread over the processes, and what updates it. packs: of a step, of all."""
    if recipe.parallel.engine == "deepspeed":
        updater = deepspeed_updater(recipe, module, total_steps, mesh, ceil_div(packs, mesh.size("dp")))
        return updater.engine, updater
    spread = spread_out(module, mesh, recipe.parallel, DTYPES[recipe.train.precision])
    return spread, Updater(module, recipe.train, total_steps, spread)


def loss_without_step(
    spread: AnySpread, module: nn.Module, function: LossFunction[Batch], batch: Batch
) -> tuple[Tensor, int]:
    """function(module, batch), to validate: DeepSpeed has weights whole inside its own forward pass only, and of a
    pipeline all stages take part."""
    if isinstance(spread, Piped):
        (loss,), (count,) = spread.evaluate(function, [batch])
        return loss, count
    return spread.loss(function, batch) if isinstance(spread, ZeroEngine) else function(module, batch)
