"""What the checks of a model run on: the recipe's own where it is small, else a reduced one of its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.load import RandomWeights, fill_decoder, load_language_model
from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import UnsupportedModelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.methods import adapted_linears, apply_method, quantise_model
from tunesmith.model.quant import Quantisation, set_compute
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.recipe.schema import Recipe
from tunesmith.text.dataset import Document
from tunesmith.train.resolve import DTYPES

# Parameters up to which the recipe's own model is what a check runs on.
SMALL = 20_000_000
TINY = 2_000_000
_ON_GPU = 2_000_000_000
MOST_EXPERTS = 8


@dataclass(frozen=True)
class Subject:
    """The model of a resolved recipe, real or reduced.

    config is None on the transformers backend; widths then holds its sizes, and nothing else of it.
    """

    recipe: Recipe
    directory: Path
    config: ModelConfig | None
    widths: ModelConfig
    num_parameters: int

    def describe(self, most: int = SMALL) -> str:
        """Which model a check ran on, in words."""
        if self.num_parameters <= most:
            return "the recipe's model" if self.recipe.model.weights == "checkpoint" else "the recipe's model, random"
        if self.config is None:
            return "the same architecture with 2 layers, random weights"
        small = reduced_config(self.config, most)
        return (
            f"the same architecture with {small.num_hidden_layers} layers, hidden {small.hidden_size}, "
            f"vocabulary {small.vocab_size}, random weights"
        )

    def make(self, device: torch.device, most: int = SMALL, *, dropout: bool = False) -> LanguageModel:
        """A fresh model with the recipe's method applied and its adapters made to matter.

        Trained weights are float32; frozen ones of the native decoder as the run holds them, so that a quantised
        base is the one that is trained. Its products are those of its dequantised weights: these checks look for
        what is equal, and roundings of activations to fp8 would hide what is not.
        """
        model = self._base(device, most)
        method = self.recipe.method if dropout else self.recipe.method.model_copy(update={"dropout": 0.0})
        if method.adapter is not None:
            method = method.model_copy(update={"adapter": None})
        if self.num_parameters > most:
            method = method.model_copy(update={"trainable": _present(method.trainable)})
        apply_method(model, method, seed=0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        set_compute(cast(nn.Module, model), "weights")
        stir_adapters(model)
        return model

    def _base(self, device: torch.device, most: int) -> LanguageModel:
        quantize, dtype = self.recipe.method.quantisation, self._dtype()
        if self.num_parameters <= most:
            return load_language_model(self.recipe.model, quantize=quantize, dtype=dtype, device=device, seed=0)
        if self.config is None:
            return _reduced_foreign(self.directory, device, quantize)
        config = reduced_config(self.config, most)
        return fill_decoder(config, RandomWeights(config, dtype, device, 0), dtype, device, quantize)

    def _dtype(self) -> torch.dtype:
        frozen = self.recipe.method.kind in ("lora", "qlora") and self.config is not None
        return DTYPES[self.recipe.model.dtype] if frozen else torch.float32


def make_subject(recipe: Recipe) -> Subject:
    """The subject of a resolved recipe. Raises: ModelError."""
    directory = resolve_model(recipe.model.path, recipe.model.revision)
    if recipe.model.backend != "transformers":
        try:
            config = read_config(directory)
            with torch.device("meta"):
                return Subject(recipe, directory, config, config, _count(Decoder(config)))
        except UnsupportedModelError:
            if recipe.model.backend == "native":
                raise
    foreign = _foreign_model(directory, "meta", None)
    return Subject(recipe, directory, None, _widths(foreign.config), _count(foreign))


def reduced_config(config: ModelConfig, most: int) -> ModelConfig:
    """The same architecture with its first and last layer, few words, and narrower by halves until it is small."""
    layers = sorted({0, config.num_hidden_layers - 1})
    moe = config.moe
    if moe is not None:
        moe = replace(
            moe,
            num_experts=min(moe.num_experts, MOST_EXPERTS),
            num_experts_per_tok=min(moe.num_experts_per_tok, MOST_EXPERTS // 2),
            layers=_kept(layers, moe.layers),
        )
    small = replace(
        config,
        num_hidden_layers=len(layers),
        vocab_size=min(config.vocab_size, 512),
        max_position_embeddings=min(config.max_position_embeddings, 1024),
        sliding_layers=_kept(layers, config.sliding_layers),
        moe=moe,
    )
    while _meta_count(small) > most and small.hidden_size >= 128:
        small = _halved(small)
    return small


def _kept(layers: list[int], among: Sequence[int]) -> tuple[int, ...]:
    return tuple(new for new, old in enumerate(layers) if old in among)


def _halved(config: ModelConfig) -> ModelConfig:
    """Half as wide. The heads keep their size and, where there is more than one group, their grouping."""
    per_group = config.num_attention_heads // config.num_key_value_heads
    kv_heads = max(1, config.num_key_value_heads // 2)
    if config.num_key_value_heads == 1:
        per_group = max(1, per_group // 2)
    own_width = config.num_attention_heads * config.head_dim == config.hidden_size
    hidden = kv_heads * per_group * config.head_dim if own_width else config.hidden_size // 2
    moe = config.moe
    if moe is not None:
        moe = replace(moe, intermediate_size=max(64, moe.intermediate_size // 2))
    return replace(
        config,
        hidden_size=hidden,
        intermediate_size=max(64, config.intermediate_size // 2),
        num_attention_heads=kv_heads * per_group,
        num_key_value_heads=kv_heads,
        moe=moe,
    )


def _meta_count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return _count(Decoder(config))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _present(trainable: list[str]) -> list[str]:
    """What `method.trainable` names, with at most one block: a reduced model has two."""
    return [f"{name.split(':')[0]}:1" if ":" in name else name for name in trainable]


def _foreign_model(directory: Path, device: torch.device | str, layers: int | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _widths(config: Any) -> ModelConfig:
    """The sizes of a transformers configuration, for checks of our own operations around its model."""
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    hidden = int(config.hidden_size)
    return ModelConfig(
        family=str(config.model_type),
        vocab_size=int(config.vocab_size),
        hidden_size=hidden,
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        num_hidden_layers=int(config.num_hidden_layers),
        num_attention_heads=heads,
        num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        max_position_embeddings=int(getattr(config, "max_position_embeddings", None) or 2048),
        norm_eps=1e-5,
    )


def _reduced_foreign(directory: Path, device: torch.device, quantize: Quantisation | None) -> LanguageModel:
    model = TransformersModel(_foreign_model(directory, device, 2).eval())
    if quantize is not None:
        quantise_model(model, quantize)
    return model


@torch.no_grad()
def stir_adapters(model: LanguageModel) -> None:
    """Random B, so that adapters change the model: a fresh adapter is zero and would hide a fault."""
    for name, linear in adapted_linears(model).items():
        for adapter in linear.adapters.values():
            weight = cast(Any, adapter).B
            generator = torch.Generator().manual_seed(len(name))
            weight.copy_(torch.empty(weight.shape).normal_(0.0, 0.02, generator=generator))


class Documents:
    """Random token documents of ragged lengths with some of their tokens trained."""

    def __init__(self, lengths: Sequence[int], vocab_size: int, seed: int = 0) -> None:
        self.lengths: NDArray[np.int64] = np.asarray(lengths, dtype=np.int64)
        self.hashes: NDArray[np.uint64] = np.arange(len(lengths), dtype=np.uint64) + seed
        generator = np.random.default_rng(seed)
        self._tokens = [generator.integers(0, vocab_size, n, dtype=np.int32) for n in lengths]
        self._trained = [generator.random(n) < 0.6 for n in lengths]
        for trained in self._trained:
            trained[0] = False
            trained[-1] = len(trained) > 1

    def __len__(self) -> int:
        return len(self._tokens)

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and trained flags of one document."""
        return self._tokens[index], self._trained[index]

    def __getitem__(self, index: int) -> Document:
        return Document(tokens=self._tokens[index], trained=self._trained[index], row=f"random:{index + 1}")


def most_parameters(device: torch.device) -> int:
    """How large a model may be that is run many times: on a GPU its widths are the run's, with fewer layers."""
    return _ON_GPU if device.type == "cuda" else TINY


def vocab_size_of(model: LanguageModel) -> int:
    """How many tokens the model knows."""
    return int(cast(Any, model).config.vocab_size)
