"""Hugging Face's tensor names and ours: data, one table per family.

Parameters are held fused (qkv, gate-up); Hugging Face's per-projection names exist in this package only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tunesmith.model.decoder import Decoder


@dataclass(frozen=True)
class TensorName:
    """One tensor of a Hugging Face checkpoint and its place in the decoder.

    `part` names the projection of a fused linear, None for norms and embeddings. `shape` is the file's: where
    `transposed`, the file holds [in, out] (GPT-2's Conv1D) and we hold [out, in].
    """

    name: str
    module: str
    part: str | None
    kind: Literal["weight", "bias"]
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """How a family names its modules. Keys are our paths: `blocks.<layer>.<key>`, the part last, experts unnumbered."""

    architecture: str
    prefix: str
    layers: str
    top: Mapping[str, str]
    inside: Mapping[str, str]
    transposed: bool = False
    ignored: str = r"(^|\.)rotary_emb\.inv_freq$"


_LLAMA_TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head.lm_head": "lm_head"}
_LLAMA_ATTENTION = {
    "attention_norm": "input_layernorm",
    "attention.qkv.q_proj": "self_attn.q_proj",
    "attention.qkv.k_proj": "self_attn.k_proj",
    "attention.qkv.v_proj": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.output.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
}
_LLAMA_BLOCK = {
    **_LLAMA_ATTENTION,
    "mlp.up.gate_proj": "mlp.gate_proj",
    "mlp.up.up_proj": "mlp.up_proj",
    "mlp.down.down_proj": "mlp.down_proj",
}
_QWEN3_MOE_BLOCK = {
    **_LLAMA_BLOCK,
    "mlp.router.gate": "mlp.gate",
    "mlp.experts.up.gate_proj": "mlp.experts.{expert}.gate_proj",
    "mlp.experts.up.up_proj": "mlp.experts.{expert}.up_proj",
    "mlp.experts.down.down_proj": "mlp.experts.{expert}.down_proj",
}
_MIXTRAL_BLOCK = {
    **_LLAMA_ATTENTION,
    "mlp.router.gate": "block_sparse_moe.gate",
    "mlp.experts.up.gate_proj": "block_sparse_moe.experts.{expert}.w1",
    "mlp.experts.up.up_proj": "block_sparse_moe.experts.{expert}.w3",
    "mlp.experts.down.down_proj": "block_sparse_moe.experts.{expert}.w2",
}
_GPT2_TOP = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head.lm_head": "lm_head",
}
_GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv.c_attn": "attn.c_attn",
    "attention.output.c_proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up.c_fc": "mlp.c_fc",
    "mlp.down.c_proj": "mlp.c_proj",
}


def _llama(architecture: str, block: Mapping[str, str] = _LLAMA_BLOCK) -> Layout:
    return Layout(architecture, "model.", "model.layers", _LLAMA_TOP, block)


LAYOUTS: dict[str, Layout] = {
    "llama": _llama("LlamaForCausalLM"),
    "mistral": _llama("MistralForCausalLM"),
    "qwen2": _llama("Qwen2ForCausalLM"),
    "qwen3": _llama("Qwen3ForCausalLM"),
    "mixtral": _llama("MixtralForCausalLM", _MIXTRAL_BLOCK),
    "qwen3_moe": _llama("Qwen3MoeForCausalLM", _QWEN3_MOE_BLOCK),
    "gpt2": Layout(
        "GPT2LMHeadModel",
        "transformer.",
        "transformer.h",
        _GPT2_TOP,
        _GPT2_BLOCK,
        transposed=True,
        # The causal mask as a buffer: written by old versions of transformers, and by DialoGPT.
        ignored=r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$",
    ),
}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")


def module_name(family: str, module: str, part: str | None = None) -> str:
    """Hugging Face's name of a module, or of one projection of a fused linear (what PEFT calls a target).

    ("llama", "blocks.3.attention.qkv", "q_proj") -> "model.layers.3.self_attn.q_proj"
    Raises: KeyError for a module the family does not have.
    """
    layout = LAYOUTS[family]
    key = module if part is None else f"{module}.{part}"
    block = _BLOCK.fullmatch(key)
    if block is None:
        return layout.top[key]
    layer, inside = block.groups()
    expert = _EXPERT.fullmatch(inside)
    if expert is None:
        return f"{layout.layers}.{layer}.{layout.inside[inside]}"
    index, rest = expert.groups()
    return f"{layout.layers}.{layer}." + layout.inside[f"mlp.experts.{rest}"].format(expert=index)


def tensor_names(decoder: Decoder) -> Iterator[TensorName]:
    """Every tensor of the decoder's checkpoint, in the order of its modules.

    Also of a decoder whose linears were replaced: whatever has `parts` and `in_features` is a linear.
    """
    family = decoder.config.family
    for path, module in _leaves(decoder, ""):
        parts = getattr(module, "parts", None)
        if parts is None:
            yield from _plain_names(family, path, module)
        else:
            yield from _part_names(family, path, module, parts)


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold checkpoint tensors; nothing below a linear is one (an adapter's base is the linear itself), and
    a copy of the head is none."""
    for name, child in module.named_children():
        if isinstance(module, Decoder) and child is module.head_copy:
            continue
        inner = f"{path}.{name}" if path else name
        if hasattr(child, "parts") or hasattr(child, "weight"):
            yield inner, child
        else:
            yield from _leaves(child, inner)


def _plain_names(family: str, path: str, module: Any) -> Iterator[TensorName]:
    name = module_name(family, path)
    yield TensorName(f"{name}.weight", path, None, "weight", tuple(module.weight.shape))
    bias = getattr(module, "bias", None)
    if bias is not None:
        yield TensorName(f"{name}.bias", path, None, "bias", tuple(bias.shape))


def _part_names(family: str, path: str, module: Any, parts: Mapping[str, int]) -> Iterator[TensorName]:
    transposed = LAYOUTS[family].transposed and not path.startswith("head")
    for part, rows in parts.items():
        name = module_name(family, path, part)
        in_features = int(module.in_features)
        shape = (in_features, rows) if transposed else (rows, in_features)
        yield TensorName(f"{name}.weight", path, part, "weight", shape, transposed)
        if getattr(module, "bias", None) is not None:
            yield TensorName(f"{name}.bias", path, part, "bias", (rows,))
