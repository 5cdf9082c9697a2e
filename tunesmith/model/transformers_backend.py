"""Any causal language model of transformers, behind the same face as the native decoder.

Documents become right-padded rows with an attention mask, so that no document can see another whatever the
architecture: causal attention never looks at the padding on its right, a recurrent state starts anew in every row.
That, and that the head is what `logits` says, is tried out once when a model is wrapped, and refused where it fails.
The model's own code from a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.packed import PackedTokens, pack_documents
from tunesmith.rundir.io import read_json, system_errors, write_json_atomic

Checkpointing = Literal["none", "block", "selective", "selective-qkv", "offload", "offload-block"]
_PROBE = ([5, 3, 8, 1, 7, 2, 6, 4], [9, 2, 4], [1, 6, 3, 5, 2])


class TransformersModel(nn.Module):
    """A `LanguageModel` around a transformers model.

    Where the weights are held in another dtype than `compute_dtype` its operators run under torch's autocast, the one
    place where tunesmith does: the casts can't be put into another library's code. Dropout is off, as in the native
    decoder: with it the gradient of a batch would depend on how the batch is cut.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backend: Literal["native", "transformers"] = "transformers"
        self.compute_dtype: torch.dtype | None = None
        self.noise_alpha = 0.0
        self.model = model
        self.training = model.training
        self._checkpointing: Checkpointing = "none"
        self._noise_lengths: Tensor | None = None
        self._finish = _head_transform(model.config)
        _no_dropout(model)
        model.get_input_embeddings().register_forward_hook(self._add_noise)
        try:
            _probe(self)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"{type(model).__name__} can't run through the transformers backend: {_first_line(error)}"
            ) from error

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        weights: Literal["checkpoint", "random"] = "checkpoint",
        seed: int = 0,
    ) -> TransformersModel:
        """The model of a directory in `dtype` (None: the checkpoint's), or with random weights from its configuration.

        Raises: ModelError when it can't be loaded whole; UnsupportedModelError when transformers doesn't know it, or
        it can't do what tunesmith asks of a language model.
        """
        make = _random if weights == "random" else _from_checkpoint
        model = make(directory, dtype, torch.device(device), seed)
        return cls(model.to(device))

    @property
    def config(self) -> Any:
        """The configuration as transformers has it."""
        return self.model.config

    @property
    def checkpointing(self) -> Checkpointing:
        """none, or block (every block is recomputed)."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, kind: Checkpointing) -> None:
        if kind not in ("none", "block"):
            raise UnsupportedModelError(
                f"train.checkpointing {kind!r} needs the native decoder; the transformers backend has none and block"
            )
        if kind == "block":
            if not getattr(self.model, "supports_gradient_checkpointing", False):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has no gradient checkpointing: set train.checkpointing to none"
                )
            _set_block_checkpointing(self.model, True)
        elif self._checkpointing == "block":
            _set_block_checkpointing(self.model, False)
        self._checkpointing = kind

    def hidden(self, pack: PackedTokens) -> Tensor:
        """hidden_TD after the final norm, packed again, in the compute dtype."""
        starts = [0]
        for length in pack.lengths:
            starts.append(starts[-1] + length)
        pieces: list[Tensor] = [pack.tokens_T] * len(pack.lengths)
        for documents in length_groups(pack.lengths):
            rows = [pack.tokens_T[starts[i] : starts[i + 1]] for i in documents]
            for i, hidden in zip(documents, self._rows(rows), strict=True):
                pieces[i] = hidden
        return torch.cat(pieces)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV in the dtype of the hidden states."""
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        logits_TV = F.linear(hidden_TD, head.weight.to(hidden_TD.dtype), None if bias is None else bias.to(hidden_TD))
        return self._finish(logits_TV)

    def plain_head(self) -> Tensor | None:
        """weight_VD where `logits` is hidden_TD @ weight_VD.T and nothing else."""
        head = self.model.get_output_embeddings()
        plain = getattr(head, "bias", None) is None and self._finish is _as_they_are
        return head.weight if plain else None

    def save(self, directory: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a directory that transformers (and tunesmith) load: config.json and safetensors.

        Args: dtype: converted to, one tensor after the other on the host; None keeps each tensor's.
        """
        with system_errors():
            if dtype is None:
                self.model.save_pretrained(directory)
                return
            self.model.save_pretrained(directory, state_dict=_converted(self.model, dtype))
            path = directory / "config.json"
            write_json_atomic(path, {**read_json(path), "dtype": str(dtype).removeprefix("torch.")})

    def _rows(self, rows: list[Tensor]) -> Iterator[Tensor]:
        """The hidden states of each document, computed side by side."""
        lengths = [row.numel() for row in rows]
        tokens_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask_BT = torch.arange(tokens_BT.shape[1])[None, :] < torch.tensor(lengths)[:, None]
        self._noise_lengths = torch.tensor(lengths, device=tokens_BT.device)
        with self._computing():
            out = self.model.base_model(
                input_ids=tokens_BT, attention_mask=mask_BT.to(tokens_BT.device, torch.int64), use_cache=False
            )
        hidden_BTD = out.last_hidden_state.to(self._dtype())
        for index, length in enumerate(lengths):
            yield hidden_BTD[index, :length]

    def _dtype(self) -> torch.dtype:
        return self.compute_dtype or self.model.get_input_embeddings().weight.dtype

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        weight = self.model.get_input_embeddings().weight
        if weight.dtype == self._dtype():
            return contextlib.nullcontext()
        if self._dtype() == torch.float32:
            raise UnsupportedModelError(
                f"the transformers backend can't compute in float32 on {weight.dtype} weights: "
                f"set model.dtype to float32"
            )
        return torch.autocast(weight.device.type, dtype=self._dtype())

    def _add_noise(self, module: nn.Module, inputs: Any, embedded_BTD: Tensor) -> Tensor:
        """NEFTune. Source: arXiv 2310.05914, section 2: uniform in ±alpha / sqrt(length * D)."""
        if not (self.training and self.noise_alpha) or self._noise_lengths is None:
            return embedded_BTD
        scale_B = self.noise_alpha / (self._noise_lengths * embedded_BTD.shape[-1]).sqrt()
        noise = torch.empty_like(embedded_BTD).uniform_(-1, 1) * scale_B[:, None, None].to(embedded_BTD.dtype)
        return embedded_BTD + noise


def _converted(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors on the host, floating-point ones in `dtype`; what the model holds under two names stays one."""
    tensors = model.state_dict(keep_vars=True)
    copies = {id(t): t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype) for t in tensors.values()}
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def length_groups(lengths: tuple[int, ...]) -> list[list[int]]:
    """Documents that run side by side: those of one power of two of length, so that less than half is padding."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(index)
    return list(groups.values())


def _set_block_checkpointing(model: Any, on: bool) -> None:
    """Under either of the names that transformers 5 has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        enable = getattr(model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def _no_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def _head_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What some families do to the logits after the head; `_probe` checks that nothing is left out."""
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    if scale is not None:
        return lambda logits: logits * scale
    if divisor is not None:
        return lambda logits: logits / divisor
    return _as_they_are


def _as_they_are(logits_TV: Tensor) -> Tensor:
    return logits_TV


def _from_checkpoint(directory: Path, dtype: torch.dtype | None, device: torch.device, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    with _refusals(directory):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    lacking = sorted(info.get("missing_keys", ())) + sorted(str(m[0]) for m in info.get("mismatched_keys", ()))
    if lacking:
        raise ModelError(
            f"the checkpoint in {directory} lacks tensors, or has them in another shape: {', '.join(lacking[:4])}"
        )
    return model


def _random(directory: Path, dtype: torch.dtype | None, device: torch.device, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    devices = [device] if device.type == "cuda" else []
    with _refusals(directory), torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, trust_remote_code=False)


@contextlib.contextmanager
def _refusals(directory: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(f"transformers can't load {directory}: {_first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise ModelError(f"transformers can't load {directory}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@torch.no_grad()
def _probe(model: TransformersModel) -> None:
    """Refuse a model whose documents see each other, that looks ahead, or whose head is not what `logits` computes."""
    name = type(model.model).__name__
    if model.model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head")
    was_training = model.training
    model.eval()
    device = model.model.get_input_embeddings().weight.device
    together = model.hidden(pack_documents(_PROBE, device)).split([len(document) for document in _PROBE])
    alone = [model.model(torch.tensor([document], device=device), use_cache=False).logits[0] for document in _PROBE]
    ahead = model.hidden(pack_documents([_PROBE[0][:-1]], device))
    model.train(was_training)
    if not _close(ahead, together[0][:-1]):
        raise UnsupportedModelError(f"{name} looks at later tokens: it is no causal language model")
    if not all(_close(model.logits(hidden), logits) for hidden, logits in zip(together, alone, strict=True)):
        raise UnsupportedModelError(
            f"{name} gives other logits for padded rows than for a document alone, or changes them after its head: "
            f"the transformers backend would be wrong for it"
        )


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for rounding: 1e-3 of the largest value in float32, wider in 16 bits."""
    tolerance = 1e-3 if theirs.dtype == torch.float32 else 5e-2
    ours, theirs = ours.float(), theirs.float()
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-6))
