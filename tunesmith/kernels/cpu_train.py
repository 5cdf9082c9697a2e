"""What training computes in float32 on a CPU, by our own C++ (cpu_train.cpp): operations in one trip through memory.

    norm, its gradient · rotation · SwiGLU, its gradient · the loss over logits and its gradient · large products

A training session asks for it with `prepare`; until then, where there is no C++ compiler, and with
TUNESMITH_CPU_TRAIN=0 plain torch does the same, but for the order of sums and the last bits of exponentials. The
results have the same bits in every run and with any number of threads. Those are torch's own: libgomp's.

Products go through the matrix unit (AMX) where the CPU has one: each float32 factor is the exact sum of three bfloat16,
and six of their nine products are summed in float32, so that the error is that of a float32 product (cpu_split.hpp).
Elsewhere they are torch's.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from tunesmith.kernels.cpu_compile import BuildError, load_compiled
from tunesmith.kernels.torch_threads import address_in_libgomp

SWITCH = "TUNESMITH_CPU_TRAIN"
_PART_ROWS = 32
"""Rows of a part, of each of which the norm's weight has a gradient of its own (ROWS in cpu_rows.hpp)."""
FEWEST_ROWS = 256
"""Of fewer rows splitting the weight costs more than the product saves."""
_I64, _POINTER, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_ARGUMENTS: dict[str, list[type]] = {
    "norm": [_POINTER] * 4 + [_FLOAT, _I64, _I64],
    "norm_backward": [_POINTER] * 7 + [_I64],
    "rope": [_POINTER] * 3 + [_I64] * 2,
    "swiglu": [_POINTER] * 2 + [_I64],
    "swiglu_backward": [_POINTER] * 4 + [_I64],
    "cross_entropy": [_POINTER] * 3 + [_FLOAT, _I64, _I64],
    "attention": [_POINTER, _I64, _I64],
    "outer": [_POINTER, _I64, _I64, _I64],
    "product": [_POINTER, _I64],
    "threads": [_POINTER],
}
_ALLOCATING = ("attention", "outer", "product")
_log = logging.getLogger(__name__)


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", _POINTER),
        *((name, _I64) for name in ("tokens", "heads", "width", "token_stride", "head_stride")),
    ]


class _Band(ctypes.Structure):
    _fields_ = [(name, _I64) for name in ("row", "row_end", "inner", "inner_end")]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("x", "residual", "bias", "out")),
        *((name, _I64) for name in ("tokens", "x_ld", "residual_ld", "out_ld")),
        *((name, _POINTER) for name in ("weight", "wide", "narrow")),
        *((name, _I64) for name in ("rows", "columns", "wide_ld", "narrow_ld", "flat", "num_bands")),
        ("bands", _POINTER),
        ("rank", _I64),
        ("low", _POINTER),
        ("low_ld", _I64),
    ]


_ATTENDED = ("query", "key", "value", "out", "grad", "of_query", "of_key", "of_value")


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Rows) for name in _ATTENDED),
        ("logs", _POINTER),
        ("starts", _POINTER),
        ("documents", _I64),
        ("scale", _FLOAT),
    ]


class _Outer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("left", "right", "out")),
        *((name, _I64) for name in ("left_ld", "right_ld", "rank", "width", "turned")),
        ("scale", _FLOAT),
    ]


@dataclass
class _State:
    """What `prepare` found. library: None until then, and where there is none."""

    library: ctypes.CDLL | None = None
    is_asked: bool = False
    splits: bool = False
    reason: str | None = None


_state = _State()


@dataclass(frozen=True)
class Outer:
    """scale * left.T @ right, or where `turned` its transpose. left [T, R], right [T, D]."""

    left: Tensor
    right: Tensor
    scale: float = 1.0
    turned: bool = False


@dataclass(frozen=True)
class Adapted:
    """weight_FD + up_FR @ down_RD, of which each block (rows of up, inner columns) is all that is not zero."""

    weight_FD: Tensor
    up_FR: Tensor | None = None
    down_RD: Tensor | None = None
    blocks: Sequence[tuple[slice, slice]] = ()

    @property
    def rank(self) -> int:
        """R."""
        return 0 if self.down_RD is None else len(self.down_RD)


def prepare() -> bool:
    """Load the library for this process, built where it is not there yet. Returns: whether there is one."""
    if not _state.is_asked:
        _state.is_asked = True
        _state.library, _state.reason = _load()
        _state.splits = _state.library is not None and bool(_state.library.tunesmith_can_split())
    return _state.library is not None


def forget() -> None:
    """Go back to plain torch."""
    _state.library, _state.is_asked, _state.splits, _state.reason = None, False, False, None


def facts() -> dict[str, bool | str | None]:
    """Whether operations are compiled here and products split, and why not, where that was asked for."""
    return {"compiled": _state.library is not None, "split_products": _state.splits, "reason": _state.reason}


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false", "no"):
        return None, f"{SWITCH} is off"
    try:
        fork = address_in_libgomp("GOMP_parallel")
        library = load_compiled("cpu_train")
    except (BuildError, OSError) as error:
        _log.warning(
            "training on this CPU goes through torch, which is slower: %s (%s=0 asks for that without a word)",
            error,
            SWITCH,
        )
        return None, str(error)
    for name, types in _ARGUMENTS.items():
        function = getattr(library, f"tunesmith_{name}")
        function.argtypes, function.restype = types, _I64 if name in _ALLOCATING else None
    for name in _ALLOCATING:
        getattr(library, f"tunesmith_{name}").errcheck = _with_memory
    library.tunesmith_can_split.restype = _I64
    library.tunesmith_threads(fork)
    return library, None


def _with_memory(status: int, function: object, arguments: tuple[object, ...]) -> None:
    if status:
        raise MemoryError("no memory for a compiled operation")


def takes(*tensors: Tensor | None) -> bool:
    """Whether the compiled operations take these: float32 on a CPU, rows of 2 or 3 dimensions that are contiguous."""
    return _state.library is not None and all(t is None or _is_plain(t) for t in tensors)


def _is_plain(t: Tensor) -> bool:
    if type(t) is not Tensor and type(t) is not nn.Parameter:
        return False
    return t.dtype == torch.float32 and t.device.type == "cpu" and 0 < t.dim() <= 3 and t.stride(-1) == 1


def takes_product(x_TK: Tensor, weight_FD: Tensor, *added: Tensor | None) -> bool:
    """Whether `product` takes these: see `takes`; and there is a matrix unit, and enough work for it."""
    return _state.splits and x_TK.dim() == 2 and len(x_TK) >= FEWEST_ROWS and takes(x_TK, weight_FD, *added)


def _library() -> ctypes.CDLL:
    assert _state.library is not None
    return _state.library


def _rows(t: Tensor) -> _Rows:
    """[T, D] as one head, or [T, N, H]."""
    shape, stride = t.shape, t.stride()
    if len(shape) == 2:
        return _Rows(t.data_ptr(), shape[0], 1, shape[1], stride[0], 0)
    return _Rows(t.data_ptr(), shape[0], shape[1], shape[2], stride[0], stride[1])


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _check(t: Tensor | None, *shape: int) -> None:
    """Whether memory that is addressed by these sizes has them, and rows that are contiguous. Raises: ValueError."""
    if t is not None and (t.shape != shape or (t.stride(-1) != 1 and t.shape[-1] > 1)):
        raise ValueError(f"got {list(t.shape)} with strides {t.stride()} where rows {list(shape)} are read or written")


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, rstd_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y and rstd, which is read where it is given: see `kernels.rms_norm`."""
    rstd = x_TD.new_empty(x_TD.shape[:-1]) if rstd_T is None else rstd_T.expand(x_TD.shape[:-1]).contiguous()
    y, weight = x_TD.new_empty(x_TD.shape), weight_D.expand(x_TD.shape[-1]).contiguous()
    arguments = (_rows(x_TD), _rows(y), weight.data_ptr(), rstd.data_ptr(), eps, rstd_T is not None)
    _library().tunesmith_norm(*map(_by_reference, arguments), torch.get_num_threads())
    return y, rstd


def rms_norm_backward(
    grad_y_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, add_TD: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.rms_norm`."""
    _check(grad_y_TD, *x_TD.shape)
    _check(add_TD, *x_TD.shape)
    out, rstd = x_TD.new_empty(x_TD.shape), rstd_T.expand(x_TD.shape[:-1]).contiguous()
    weight = weight_D.expand(x_TD.shape[-1]).contiguous()
    parts = x_TD.new_zeros(-(-len(x_TD) // _PART_ROWS), x_TD.shape[-1]) if weight_grad else None
    add = _Rows() if add_TD is None else _rows(add_TD)
    arguments = (_rows(grad_y_TD), _rows(x_TD), add, _rows(out), weight.data_ptr(), rstd.data_ptr())
    _library().tunesmith_norm_backward(*map(_by_reference, arguments), _pointer(parts), torch.get_num_threads())
    return out, None if parts is None else parts.sum(0)


def rope_(x_TNH: Tensor, cos_TH2: Tensor, sin_TH2: Tensor, inverse: bool) -> None:
    """See `kernels.rope`."""
    rows, shape = ctypes.byref(_rows(x_TNH)), (x_TNH.shape[0], x_TNH.shape[2] // 2)
    cos, sin = (table.expand(shape).contiguous() for table in (cos_TH2, sin_TH2))
    _library().tunesmith_rope(rows, cos.data_ptr(), sin.data_ptr(), inverse, torch.get_num_threads())


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """See `kernels.swiglu`."""
    h = gate_up_TF.new_empty(gate_up_TF.shape[0], gate_up_TF.shape[1] // 2)
    arguments = map(_by_reference, (_rows(gate_up_TF.unflatten(1, (2, -1))), _rows(h)))
    _library().tunesmith_swiglu(*arguments, torch.get_num_threads())
    return h


def swiglu_backward(
    grad_h_TI: Tensor, gate_up_TF: Tensor, want_h: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.swiglu`."""
    out = gate_up_TF.new_empty(gate_up_TF.shape) if out is None else out
    _check(out, *gate_up_TF.shape)
    _check(grad_h_TI, len(gate_up_TF), gate_up_TF.shape[1] // 2)
    h = grad_h_TI.new_empty(grad_h_TI.shape) if want_h else None
    halves = [_rows(t.unflatten(1, (2, -1))) for t in (gate_up_TF, out)]
    arguments = (_rows(grad_h_TI), *halves, _Rows() if h is None else _rows(h))
    _library().tunesmith_swiglu_backward(*map(_by_reference, arguments), torch.get_num_threads())
    return out, h


def cross_entropy_and_grad_(logits_TV: Tensor, targets_T: Tensor, scale: float, ignored: int) -> Tensor:
    """See `kernels.cross_entropy`."""
    losses, targets = logits_TV.new_empty(len(logits_TV)), targets_T.long().contiguous()
    _check(targets, len(logits_TV))
    _library().tunesmith_cross_entropy(
        ctypes.byref(_rows(logits_TV)), targets.data_ptr(), losses.data_ptr(), scale, ignored, torch.get_num_threads()
    )
    return losses


def attend(logs_TN: Tensor, lengths: Sequence[int], *tensors: Tensor, is_backward: bool = False) -> None:
    """Causal attention of documents of these lengths, one behind the other: see `model.cpu_attention`.

    Args: logs_TN: float32, contiguous; written, and read in the backward pass. tensors: query_TNH, key_TKH, value_TKH,
    out_TNH, which is written; in the backward pass also the gradient of out, and where those of query, key and value
    go. H is a multiple of 16, N one of K.
    Raises: ValueError.
    """
    query, key = (t.shape for t in tensors[:2])
    for place, tensor in enumerate(tensors):
        _check(tensor, *(query if _ATTENDED[place] in ("query", "out", "grad", "of_query") else key))
    _check(logs_TN, *query[:2])
    if sum(lengths) != query[0] or key != (query[0], key[1], query[2]) or query[1] % key[1] or query[2] % 16:
        raise ValueError(f"no attention of queries {list(query)} and keys {list(key)} in documents of {lengths} tokens")
    starts = (_I64 * (len(lengths) + 1))(0, *accumulate(lengths))
    rows = [*map(_rows, tensors), *(_Rows() for _ in _ATTENDED[len(tensors) :])]
    scale = tensors[0].shape[-1] ** -0.5
    job = _Attention(*rows, logs_TN.data_ptr(), ctypes.addressof(starts), len(lengths), scale)
    _library().tunesmith_attention(ctypes.byref(job), is_backward, torch.get_num_threads())


def takes_outer(*jobs: Outer) -> bool:
    """Whether `outer` takes these: see `takes`; and their right sides are whole vectors wide."""
    return takes(*(t for job in jobs for t in (job.left, job.right))) and all(
        job.right.shape[1] % 16 == 0 for job in jobs
    )


def outer(*jobs: Outer) -> list[Tensor]:
    """The products of adapters' gradients, all of the same tokens."""
    found, given = [], (_Outer * len(jobs))()
    for place, job in enumerate(jobs):
        rank, width = job.left.shape[1], job.right.shape[1]
        _check(job.left, len(jobs[0].left), rank)
        _check(job.right, len(jobs[0].left), width)
        out = job.left.new_empty((width, rank) if job.turned else (rank, width))
        pointers = (job.left.data_ptr(), job.right.data_ptr(), out.data_ptr())
        given[place] = _Outer(*pointers, job.left.stride(0), job.right.stride(0), rank, width, job.turned, job.scale)
        found.append(out)
    _library().tunesmith_outer(ctypes.byref(given), len(jobs), len(jobs[0].left), torch.get_num_threads())
    return found


def product(
    x_TK: Tensor,
    right: Adapted,
    *,
    flat: bool,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    low: Tensor | None = None,
) -> Tensor:
    """residual + x @ w.T + bias, or where `flat` residual + x @ w + bias, w being the adapted weight.

    Args: out: where it is written; nothing else that is given may lie there. low: [T, R], where x @ down.T, or x @ up
    where `flat`, is written.
    """
    weight = right.weight_FD.contiguous()
    rows, columns = weight.shape
    depth, width = (rows, columns) if flat else (columns, rows)
    out = x_TK.new_empty(len(x_TK), width) if out is None else out
    for tensor, size in ((x_TK, depth), (residual, width), (out, width), (low, right.rank)):
        _check(tensor, len(x_TK), size)
    _check(right.up_FR, rows, right.rank)
    _check(right.down_RD, right.rank, columns)
    bands = (_Band * len(right.blocks))(*(_Band(r.start, r.stop, c.start, c.stop) for r, c in right.blocks))
    up, down = right.up_FR, right.down_RD
    bias = None if bias is None else bias.expand(width).contiguous()
    job = _Product(
        *map(_pointer, (x_TK, residual, bias, out)),
        *(len(x_TK), x_TK.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)),
        *map(_pointer, (weight, up, down)),
        *(rows, columns, 0 if up is None else up.stride(0), 0 if down is None else down.stride(0), flat, len(bands)),
        ctypes.addressof(bands),
        *((0, None, 0) if low is None else (low.shape[1], low.data_ptr(), low.stride(0))),
    )
    _library().tunesmith_product(ctypes.byref(job), torch.get_num_threads())
    return out


def _by_reference(value: object) -> object:
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value
