"""The recipe's section `parallel`: how a run is spread over processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunesmith.recipe.section import NonNegativeFloat, PositiveInt, Section

Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero3"]


class ParallelSection(Section):
    """Only read where a run has several processes: `tunesmith launch`, torchrun, mpirun or srun starts them."""

    strategy: Strategy = Field(
        "auto",
        description="what data-parallel processes hold: ddp: everything each; zero1: a share of the optimiser's "
        "states; zero2: of gradients too; zero3: of weights too; auto: ddp for adapters, else zero3",
    )
    engine: Literal["native", "deepspeed"] = Field(
        "native", description="native: torch's DDP, FSDP2, tensor and pipeline parallelism; deepspeed: DeepSpeed's ZeRO"
    )
    tensor: PositiveInt = Field(
        1, description="processes that share each matrix (tensor parallelism, with sequence parallelism)"
    )
    pipeline: PositiveInt = Field(1, description="processes that hold a share of the blocks each (1F1B)")
    micro_batches: PositiveInt | None = Field(
        None,
        description="micro-batches of one optimiser step, of all processes together; none: train.accumulation times "
        "the data-parallel processes. It stays when a run goes on with another number of processes; so do its batches",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where sharded weights, gradients and optimiser states wait; cpu: zero3 natively, any stage with "
        "deepspeed; nvme: deepspeed's zero3",
    )
    offload_folder: str | None = Field(None, description="offload nvme: a folder on that disk")
    deepspeed_config: str | None = Field(
        None, description="a ds_config.json (comments allowed, auto resolved), instead of what is made from the recipe"
    )
    timeout_s: NonNegativeFloat | None = Field(
        None,
        description="a process that does nothing for so long is named with its stack, and all are stopped; none: 10 s "
        "between CPUs, 60 s between GPUs; 0: no limit",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ParallelSection:
        is_deepspeed = self.engine == "deepspeed"
        if self.deepspeed_config is not None and not is_deepspeed:
            raise ValueError("parallel.deepspeed_config goes with parallel.engine deepspeed: set it, or leave it out")
        if is_deepspeed and self.tensor * self.pipeline > 1:
            raise ValueError(
                "parallel.tensor and parallel.pipeline are for parallel.engine native: set them to 1, or set the engine"
            )
        if self.offload == "nvme" and not is_deepspeed:
            raise ValueError(
                "parallel.offload nvme goes with parallel.engine deepspeed: set offload to cpu, or the engine"
            )
        if self.offload == "nvme" and self.offload_folder is None:
            raise ValueError("parallel.offload nvme needs parallel.offload_folder: name a folder on that disk")
        if self.offload == "cpu" and not is_deepspeed and self.strategy not in ("auto", "zero3"):
            raise ValueError(f"parallel.offload cpu goes with parallel.strategy zero3, not with {self.strategy}")
        if self.pipeline > 1 and self.strategy in ("zero2", "zero3"):
            raise ValueError(
                f"parallel.pipeline goes with parallel.strategy ddp or zero1, not with {self.strategy}: that gathers "
                f"the weights again for every micro-batch"
            )
        return self
