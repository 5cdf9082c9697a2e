"""A checkpoint of Hugging Face's as one GGUF file, in the format that is asked for: what llama.cpp reads.

With the `gguf` package of llama.cpp itself: its writer, its names of tensors, its quantisation. Token ids go in and
out, so the file has no vocabulary but its size. Families whose rotary halves need no reordering: Qwen2, Qwen3.
Source: the GGUF specification, github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.bench.infer.protocol import NotApplicableError, require

FORMATS = {"float32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
ARCHITECTURES = {"qwen2": "QWEN2", "qwen3": "QWEN3"}
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def write_gguf(directory: Path, target: Path, name: str) -> Path:
    """Write `target` of a model directory in a weight format. Returns: where it is.

    Raises: NotApplicableError for a family or format that it has no form for.
    """
    require("gguf", "gguf")
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    if family not in ARCHITECTURES or name not in FORMATS:
        raise NotApplicableError(f"no GGUF is made here of {family} in {name}; families: {', '.join(ARCHITECTURES)}")
    kind = gguf.GGMLQuantizationType[FORMATS[name]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family]], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(target, family)
    _describe(writer, config, gguf.LlamaFileType[f"MOSTLY_{FORMATS[name]}" if name != "float32" else "ALL_F32"])
    for key, array in tensors(directory):
        if key == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        own = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise NotApplicableError(f"GGUF has no name for the tensor {key}")
        # Vectors stay float32: that is how llama.cpp's own converter writes norms and biases.
        used = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(own, gguf.quants.quantize(array, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _describe(writer: Any, config: Mapping[str, Any], file_type: Any) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")


def tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """Name and float32 array of every tensor of a safetensors checkpoint, one in memory at a time."""
    import numpy as np

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise NotApplicableError(f"{directory} has no safetensors file")
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            kind = np.dtype(_DTYPES[entry["dtype"]])
            raw = np.fromfile(file, kind, (end - begin) // kind.itemsize, offset=8 + size + begin)
            if entry["dtype"] == "BF16":
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            yield name, raw.astype(np.float32).reshape(entry["shape"])
