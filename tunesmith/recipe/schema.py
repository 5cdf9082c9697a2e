"""The recipe's schema, version 1. `tunesmith recipe schema` prints it: `description` has a key's meaning and unit.

Values of "auto" are resolved once, by the train station, into a new object that is written to the run directory.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.section import NonNegativeFloat, NonNegativeInt, Number, PositiveInt, Ratio, Section
from tunesmith.recipe.yaml_text import model_to_yaml

VERSION = 1


_TEMPLATE_NAMES = {"tokenizer", "messages", "train_on", "now", "add_generation_prompt"}
Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSection(Section):
    path: str = Field(
        "builtin:tiny",
        description="a model directory, builtin:tiny, a Hub id, or a config.json's directory when weights is 'random'",
    )
    backend: Literal["auto", "native", "transformers"] = Field(
        "auto", description="auto: native where the family is known, else transformers, announced and recorded"
    )
    weights: Literal["checkpoint", "random"] = Field(
        "checkpoint",
        description="random: initialised on the device from the configuration (pre-training, or speed and memory runs)",
    )
    dtype: DType = Field(
        "auto",
        description=(
            "dtype the weights are held in; auto: as train.precision for frozen weights, as train.master_weights says "
            "for trained ones"
        ),
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    revision: str | None = Field(None, description="Hub revision: a branch, tag or commit")


class MethodSection(Section):
    kind: Literal["full", "freeze", "lora", "qlora"] = Field(
        "lora",
        description=(
            "full: all weights; freeze: only `trainable`; lora: adapters on a frozen base; qlora: adapters on an "
            "NF4 base"
        ),
    )
    rank: PositiveInt = Field(16, description="LoRA rank R")
    alpha: Annotated[Number, Field(gt=0, allow_inf_nan=False)] = Field(
        32.0, description="LoRA alpha; the update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)"
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(0.0, description="dropout on the adapter's input")
    targets: list[str] | Literal["all"] = Field(
        "all",
        description="projections that get adapters, as PEFT names them; all: every linear of the blocks but routers",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank)")
    dora: bool = Field(False, description="DoRA: magnitude and direction apart")
    base: Literal["checkpoint", "fp8"] = Field(
        "checkpoint",
        description="lora: how the frozen base is held; checkpoint: in model.dtype; fp8: e4m3 codes with a scale for "
        "each output row, its products in fp8 (GPUs from sm_89 on; on a CPU a slow reference)",
    )
    fp8_blocks: Literal["auto", "all", "inner"] = Field(
        "auto",
        description="the blocks that an fp8 base holds in fp8; inner: the first and the last stay in model.dtype, as "
        "the stream is most sensitive to roundings next to the embedding and the head; auto: inner where that costs at "
        "most a tenth of the weights' bytes, or 64 MiB",
    )
    double_quantisation: bool = Field(True, description="qlora: quantise the scales too")
    fp8_compute: bool = Field(
        False,
        description="qlora: NF4 weights are taken to fp8, not to the compute dtype, and products are in fp8; full: all "
        "three products of the inner blocks' linears are (GPUs from sm_89 on; on a CPU a slow reference)",
    )
    trainable: list[str] = Field(
        default_factory=list,
        description="freeze: what stays trainable: last:N (blocks), first:N, head, embedding, norms",
    )
    adapter: str | None = Field(None, description="an adapter directory to continue from (PEFT's format)")

    @property
    def quantisation(self) -> Literal["nf4", "nf4-double", "fp8", "fp8-inner"] | None:
        """How the frozen base is held; None: in model.dtype. Unresolved, `fp8_blocks` counts as all."""
        if self.kind == "qlora":
            return "nf4-double" if self.double_quantisation else "nf4"
        if self.base != "fp8":
            return None
        return "fp8-inner" if self.fp8_blocks == "inner" else "fp8"

    @property
    def uses_fp8(self) -> bool:
        """Whether products of the base are in fp8."""
        return self.fp8_compute or self.base == "fp8"


class DataSection(Section):
    train: list[str] = Field(default_factory=list, description="files, folders, builtin:shop, or Hub dataset ids")
    validation: list[str] = Field(
        default_factory=list, description="as train; empty: validation_fraction is split off the training data"
    )
    validation_fraction: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of the documents kept out of training to validate on, when data.validation is empty; "
        "0: none are; none: 0.05, but with fewer than 100 documents all are trained on",
    )
    format: Literal["auto", "alpaca", "messages", "sharegpt", "text", "preference", "tokens"] = Field(
        "auto",
        description="row format; auto: detected from the first rows and shown; tokens: random token ids (speed runs)",
    )
    encoding: str = Field("utf-8", description="text encoding of the files (a UTF-8 byte-order mark is accepted)")
    bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="stop: an error with file and line; skip: count and report them"
    )
    max_rows: PositiveInt | None = Field(None, description="read at most so many rows")
    tokenizer: str | None = Field(
        None, description="folder, builtin: name or Hub id of a tokenizer instead of the model's own (random weights)"
    )
    system: str | None = Field(None, description="system message put before every conversation that has none")
    chat_template: str | None = Field(None, description="a Jinja file instead of the tokenizer's own template")
    template_arguments: dict[str, Any] = Field(
        default_factory=dict, description="switches passed to the template, such as enable_thinking"
    )
    max_length: PositiveInt = Field(1024, description="tokens a document may have")
    too_long: Literal["truncate", "skip", "stop"] = Field(
        "truncate", description="a document over max_length: cut its end, leave it out (counted), or stop"
    )
    packing: bool = Field(
        True,
        description=(
            "true: documents fill a micro-batch end to end; false: each takes a slot of max_length, the rest "
            "untrained filler"
        ),
    )
    train_on: Literal["answers", "all"] = Field(
        "answers", description="tokens in the loss: the assistant's (end of turn included), or all but the first"
    )
    workers: NonNegativeInt | None = Field(None, description="tokenisation processes; none: as many as cores")
    cache: bool = Field(True, description="keep tokenised data in the content-addressed cache")


class TrainSection(Section):
    epochs: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="passes over the training data, ignored when max_steps is set; "
        "none: 3, and more (60 at most) where the data is so little that 3 are under 60 optimiser steps",
    )
    max_steps: PositiveInt | None = Field(None, description="optimiser steps")
    micro_batch_tokens: PositiveInt | None = Field(
        None,
        description=(
            "T: tokens of one micro-batch (at least data.max_length); none: max_length rounded up to hold 2048 "
            "on a CPU, 8192 on a GPU"
        ),
    )
    accumulation: PositiveInt = Field(
        1, description="micro-batches of one optimiser step, of each data-parallel process"
    )
    learning_rate: NonNegativeFloat | None = Field(
        None,
        description="peak learning rate; none: for adapters 2e-4 * 2048 / hidden size, within 5e-5 and 2e-3; "
        "a tenth of that where the model's own weights are trained",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="decay after the warm-up")
    warmup_ratio: Ratio = Field(0.03, description="share of the steps spent warming up")
    min_learning_rate_ratio: Ratio = Field(0.0, description="the schedule's end as a share of the peak")
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = Field(
        "adamw", description="adamw: torch's, fused where it can be; adamw8bit: block-wise 8-bit states"
    )
    optimizer_in_backward: bool = Field(
        False,
        description=(
            "update each parameter in the backward pass and free its gradient at once, for full fine-tuning in less "
            "memory; needs accumulation 1 and max_grad_norm 0"
        ),
    )
    offload_optimizer: bool = Field(
        False,
        description="AdamW's moments wait in pinned host memory and come to the GPU for the update, piece by piece, "
        "with the same results (a process alone; of several, see parallel.offload)",
    )
    beta1: Annotated[Number, Field(ge=0, lt=1)] = Field(0.9, description="AdamW: how long gradients are remembered")
    beta2: Annotated[Number, Field(ge=0, lt=1)] = Field(0.999, description="AdamW: how long their squares are")
    eps: Annotated[Number, Field(gt=0, allow_inf_nan=False)] = Field(
        1e-8, description="AdamW: added to the divisor, so that it is never zero"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="not applied to norms and biases")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="gradient clipping by global norm; 0: none")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="compute dtype; auto: bfloat16 where the device has it, else float32; float16 scales its loss",
    )
    master_weights: Literal["auto", "float32", "compute"] = Field(
        "auto",
        description="dtype of trained weights and their states; compute: as precision (pure bfloat16); auto: float32",
    )
    checkpointing: Literal["none", "block", "selective", "selective-qkv", "offload", "offload-block"] = Field(
        "none",
        description=(
            "gradient checkpointing: hold everything, recompute every block, or recompute all but products and "
            "attention (fused: the widest product too; selective-qkv: and query, key, value); offload, offload-block: "
            "as selective or block, what is held waits on the host (fused, on a GPU)"
        ),
    )
    mlp_tile_tokens: PositiveInt | None = Field(
        None,
        description=(
            "tokens that an MLP goes through at a time, for very long sequences: its widest activation never exists "
            "whole, and is computed again in the backward pass; none: all at once (needs fused blocks)"
        ),
    )
    checkpointing_skip_last: NonNegativeInt = Field(
        0,
        description="the last so many blocks are not checkpointed: needed first; raise it while memory is free",
    )
    blocks: Literal["fused", "eager"] = Field(
        "fused",
        description=(
            "fused: forward and backward passes of the blocks written out, where a family and method have that; "
            "eager: torch's operators one by one, the reference"
        ),
    )
    graphs: Literal["auto", "off"] = Field(
        "auto",
        description=(
            "auto: on a GPU the fused blocks are recorded as CUDA graphs, which takes the host out of the way; "
            "off: launched one by one"
        ),
    )
    flex_attention: bool = Field(
        False,
        description="measure FlexAttention too for packs of uneven documents on a GPU: some 20 s (needs graphs: off)",
    )
    neftune_alpha: NonNegativeFloat = Field(0.0, description="NEFTune noise on the embeddings; 0: off")
    loss_chunk_tokens: PositiveInt = Field(2048, description="tokens whose logits are held at once")
    device_memory_gb: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="GPU memory that torch may take in each process, in 10^9 bytes; none: all that is free"
    )
    seed: NonNegativeInt = Field(0, description="of everything random: another one gives another run")
    deterministic: bool = Field(False, description="deterministic kernels on a GPU (a CPU always is)")
    detect_anomaly: bool = Field(False, description="name the operation that made a NaN; slow")

    @model_validator(mode="after")
    def _goes_together(self) -> TrainSection:
        if self.checkpointing_skip_last and self.checkpointing == "none":
            raise ValueError("train.checkpointing_skip_last spares blocks, and train.checkpointing is none")
        if self.flex_attention and self.graphs != "off":
            raise ValueError("train.flex_attention makes masks, which are not recorded: set train.graphs to off")
        return self

    @model_validator(mode="after")
    def _needs_fused_blocks(self) -> TrainSection:
        wants = {
            f"checkpointing '{self.checkpointing}'": self.checkpointing
            in ("selective-qkv", "offload", "offload-block"),
            "mlp_tile_tokens": self.mlp_tile_tokens,
        }
        for name, is_wanted in wants.items():
            if is_wanted and self.blocks == "eager":
                raise ValueError(f"train.{name} is for the blocks written out: set train.blocks to fused (it is eager)")
        return self

    @model_validator(mode="after")
    def _updates_in_backward(self) -> TrainSection:
        if not self.optimizer_in_backward:
            return self
        if self.accumulation != 1:
            raise ValueError(
                f"train.optimizer_in_backward frees gradients as they come, so none can be accumulated: set "
                f"train.accumulation to 1 (it is {self.accumulation}), and train.micro_batch_tokens higher instead"
            )
        if self.max_grad_norm:
            raise ValueError(
                f"train.optimizer_in_backward updates before the global norm is known, so nothing can be clipped by "
                f"it: set train.max_grad_norm to 0 (it is {self.max_grad_norm:g})"
            )
        if self.precision == "float16":
            raise ValueError(
                "train.optimizer_in_backward can't undo a float16 overflow that is found after the first update: set "
                "train.precision to bfloat16 or float32"
            )
        return self


class EvaluationSection(Section):
    every_steps: PositiveInt | None = Field(
        None,
        description="validate every so many steps; none: once an epoch (ten times in all where epochs are under 20 "
        "steps) and at the end",
    )
    max_batches: PositiveInt | None = Field(None, description="at most so many validation micro-batches")


class CheckpointSection(Section):
    every_steps: PositiveInt | None = Field(None, description="save every so many steps; none: at the end only")
    every_minutes: Annotated[Number, Field(gt=0)] | None = Field(None, description="and at least every so many minutes")
    keep: PositiveInt = Field(2, description="checkpoints kept")


class LogSection(Section):
    every_steps: PositiveInt = Field(1, description="a row in metrics.jsonl every so many steps")
    trackers: list[Tracker] = Field(
        default=["tensorboard"],
        description="besides metrics.jsonl; TensorBoard is left out, and said so, where it is not installed",
    )
    project: str = Field("tunesmith", description="project name for the trackers")


class BenchSection(Section):
    matrix: Literal["methods", "ladder", "grid"] = Field(
        "methods",
        description=(
            "methods: full, LoRA, LoRA+GC, QLoRA, QLoRA+GC; ladder: fp32, mixed precision, + checkpointing; "
            "grid: the product of `grid`"
        ),
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="dotted recipe keys and their values, for matrix: grid"
    )
    checkpointing: Literal["selective", "selective-qkv", "block", "offload", "all"] = Field(
        "selective",
        description="what `+ checkpointing` cells do; all: selective, and block in cells of its own",
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="per-cell recipe overrides: {full: {train.learning_rate: 1e-5}}"
    )
    warmup_steps: NonNegativeInt = Field(3, description="steps left out of the timing")
    steps: PositiveInt = Field(10, description="timed steps of a cell")
    repeats: PositiveInt = Field(1, description="times each cell runs, in shuffled order")
    count_memory: bool = Field(True, description="on a CPU: a separate untimed pass that counts live storages")
    timeout_s: Annotated[Number, Field(gt=0)] = Field(
        3600.0, description="a cell that runs longer is stopped and kept as a failed row"
    )


class Recipe(Section):
    """Everything a run is made of."""

    version: Literal[1] = Field(1, description="the schema's version")
    name: str = Field("run", pattern=r"^[^/\\\x00-\x1f]{1,80}$", description="names the run directory")
    output: str = Field("runs", description="folder that holds run directories")
    model: ModelSection = Field(default_factory=ModelSection)
    method: MethodSection = Field(default_factory=MethodSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)
    bench: BenchSection = Field(default_factory=BenchSection)

    def to_yaml(self) -> str:
        """The recipe as YAML, every key; `recipe.load.load_recipe` reads it back equal."""
        return model_to_yaml(self)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        taken = sorted(_TEMPLATE_NAMES & self.data.template_arguments.keys())
        if taken:
            raise ValueError(
                f"data.template_arguments can't set {taken[0]!r}: tunesmith gives it to the template itself"
            )
        tokens = self.train.micro_batch_tokens
        if tokens is not None and tokens < self.data.max_length:
            raise ValueError(
                f"train.micro_batch_tokens ({tokens}) must be at least data.max_length ({self.data.max_length}): "
                f"a document is never cut across micro-batches"
            )
        if self.method.kind == "freeze" and not self.method.trainable:
            raise ValueError("method.kind 'freeze' needs method.trainable, for instance ['last:2', 'head']")
        if self.method.kind in ("full", "freeze") and self.method.adapter is not None:
            raise ValueError(f"method.adapter goes with lora or qlora, not with {self.method.kind}")
        if self.method.base == "fp8" and self.method.kind != "lora":
            can = self.method.kind in ("qlora", "full")
            instead = ": set method.fp8_compute to true" if can else " (its frozen layers are not quantised)"
            raise ValueError(f"method.base 'fp8' goes with method.kind lora, not with {self.method.kind}{instead}")
        if self.method.fp8_compute and self.method.kind not in ("qlora", "full"):
            instead = ": set method.base to fp8" if self.method.kind == "lora" else ""
            raise ValueError(
                f"method.fp8_compute goes with method.kind qlora or full, not with {self.method.kind}{instead}"
            )
        if self.train.precision == "float16" and self.train.master_weights == "compute":
            raise ValueError(
                "train.master_weights 'compute' goes with bfloat16 or float32: gradients of float16 weights "
                "round to zero; set train.master_weights to float32"
            )
        if self.bench.matrix == "grid" and not self.bench.grid:
            raise ValueError("bench.matrix 'grid' needs bench.grid, for instance {train.checkpointing: [none, block]}")
        return self
