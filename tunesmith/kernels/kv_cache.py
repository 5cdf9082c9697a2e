"""Writing new keys and values into the pages of the key/value cache, in their dtype or as scaled fp8.

A token's slot is page * S + its offset in the page; slot -1 is a row of padding, which is not written. Pages of fp8
(e4m3) have a float32 scale per page and head, a power of two p with |x| <= 448 p, so that

    x  ~  code * p,      code = fp8(x / p),      p = 2^ceil(log2(largest |x| / 448))

and a page that gets a larger value is moved to its new scale exactly, but for codes too small to be normal numbers.
A write at offset 0 begins a page anew: whatever was there, codes and scale, is forgotten. So a page's scale is a
function of what the request wrote, not of who had the page before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.fp8 import to_codes
from tunesmith.kernels.kv_cache_scale import SMALLEST_SCALE, power_of_two_scale
from tunesmith.kernels.nf4 import use_kernel


def write_kv(
    key_TKH: Tensor,
    value_TKH: Tensor,
    keys_PSKH: Tensor,
    values_PSKH: Tensor,
    slots_T: Tensor,
    key_scales_PK: Tensor | None = None,
    value_scales_PK: Tensor | None = None,
) -> None:
    """Put each token's key and value into its slot.

    Args: key_TKH, value_TKH: strides of tokens are free, heads lie one after the other. keys_PSKH, values_PSKH:
    contiguous pages, of the same dtype as the keys or float8_e4m3fn. slots_T: int64; the slots of one page are
    neighbours in the batch and ascend, as a request's consecutive tokens do; no two tokens share one. key_scales_PK,
    value_scales_PK: float32, needed for (and only for) fp8; they are updated.
    """
    if use_kernel(keys_PSKH.device):
        from tunesmith.kernels.kv_cache_triton import write_kv_operator

        pages = (keys_PSKH, values_PSKH, slots_T, key_scales_PK, value_scales_PK)
        direct(write_kv_operator, key_TKH)(key_TKH, value_TKH, *pages)
        return
    write_kv_reference(key_TKH, value_TKH, keys_PSKH, values_PSKH, slots_T, key_scales_PK, value_scales_PK)


def write_kv_reference(
    key_TKH: Tensor,
    value_TKH: Tensor,
    keys_PSKH: Tensor,
    values_PSKH: Tensor,
    slots_T: Tensor,
    key_scales_PK: Tensor | None = None,
    value_scales_PK: Tensor | None = None,
) -> None:
    """write_kv by plain torch: the truth that the kernel must equal, bit for bit."""
    is_written = slots_T >= 0
    if not bool(is_written.all()):
        key_TKH, value_TKH, slots_T = key_TKH[is_written], value_TKH[is_written], slots_T[is_written]
    for new_TKH, pages_PSKH, scales_PK in (
        (key_TKH, keys_PSKH, key_scales_PK),
        (value_TKH, values_PSKH, value_scales_PK),
    ):
        if scales_PK is None:
            pages_PSKH.view(-1, *pages_PSKH.shape[2:]).index_copy_(0, slots_T, new_TKH.to(pages_PSKH.dtype))
        elif slots_T.numel():
            _write_fp8(new_TKH.float(), pages_PSKH, slots_T, scales_PK)


def _write_fp8(new_TKH: Tensor, pages_PSKH: Tensor, slots_T: Tensor, scales_PK: Tensor) -> None:
    """One page after the other of those that are written: its scale first, then what it holds, then what is new."""
    slots_of_page = pages_PSKH.shape[1]
    page_T = slots_T // slots_of_page
    page_G, group_T, count_G = page_T.unique_consecutive(return_inverse=True, return_counts=True)
    offset_G = slots_T[count_G.cumsum(0) - count_G] % slots_of_page
    largest_GK = new_TKH.new_zeros(len(page_G), new_TKH.shape[1])
    index_TK = group_T[:, None].expand(-1, new_TKH.shape[1])
    largest_GK.scatter_reduce_(0, index_TK, new_TKH.abs().amax(-1), "amax")
    is_begun = (offset_G > 0)[:, None]
    old_GK = torch.where(is_begun, scales_PK[page_G], SMALLEST_SCALE)
    scale_GK = torch.maximum(old_GK, power_of_two_scale(largest_GK))
    grown = (is_begun & (scale_GK > old_GK)).any(-1)
    if bool(grown.any()):
        before = torch.arange(slots_of_page, device=slots_T.device) < offset_G[grown, None]
        ratio = torch.where(before[..., None], (scale_GK[grown] / old_GK[grown])[:, None], 1.0)[..., None]
        pages_PSKH[page_G[grown]] = to_codes(pages_PSKH[page_G[grown]].float(), ratio)
    scales_PK[page_G] = scale_GK
    codes = to_codes(new_TKH, scale_GK[group_T][..., None])
    flat = pages_PSKH.view(torch.uint8).view(-1, *pages_PSKH.shape[2:])
    flat.index_copy_(0, slots_T, codes.view(torch.uint8))
