"""Packed attention: every image attends to itself alone, whatever its number of tokens.

Legend: Tq query rows and Tk key rows of the batch, N heads, H channels per head.

Queries and keys have their own packing, so that class queries may look at live tokens (ATM heads) and live tokens at
frozen ones. Four ways lead to the same result; `attention_path` names the one that will run.

- `batched`: all images have equally many rows; the packed tensor is a plain batch.
- `loop`: CPU; one fused call for each image over views, nothing is padded or copied.
- `varlen`: CUDA in bf16 or fp16; the variable-length kernel of torch.
- `padded`: anything else; images padded to the longest, padding masked out.

Keys may have weights: one of weight w counts as w equal keys, `w e^s` in place of `e^s` in the softmax. The
variable-length kernel knows none, so that CUDA pads then.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.tokens import Packing, PaddedPacking, rows_where

SCORES_IN_CACHE = 2**20
"""Attention scores that one piece of `_products` holds: 2 MiB in bf16, about a core's own cache."""
UNSEEN = -1e4
"""Added to scores of padding: its exponential is 0, and unlike infinity every precision holds it."""

AttentionPath = Literal["batched", "loop", "varlen", "padded"]


def attention_path(device: torch.device, dtype: torch.dtype, uniform: bool = False) -> AttentionPath:
    """Return the implementation that `packed_attention` uses for this device and precision."""
    if uniform:
        return "batched"
    if device.type == "cpu":
        return "loop"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "varlen"
    return "padded"


def packed_attention(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    packing_q: Packing,
    packing_k: Packing,
    dropout: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Apply softmax attention within each image, scaled by `H ** -0.5`.

    q_TNH: `(Tq, N, H)`; k_TNH, v_TNH: `(Tk, N, H)`. Returns `(Tq, N, H)`. A query whose image has no key at all
    receives zeros. dropout: probability to drop an attention weight; pass 0 outside training. weight: `(Tk,)` fp32,
    positive, of each key; all count once if not given.
    """
    bias = None if weight is None else weight.log().to(q_TNH.dtype)
    if isinstance(packing_k, PaddedPacking):
        return _without_padding(q_TNH, k_TNH, v_TNH, packing_k.visible, dropout, bias)
    uniform = packing_q.uniform and packing_k.uniform and packing_k.longest > 0
    path = attention_path(q_TNH.device, q_TNH.dtype, uniform)
    if path == "batched":
        return _batched(q_TNH, k_TNH, v_TNH, len(packing_q.lengths), dropout, bias)
    if path == "loop":
        return _loop(q_TNH, k_TNH, v_TNH, packing_q, packing_k, dropout, bias)
    if path == "varlen" and dropout == 0.0 and bias is None:
        return _varlen(q_TNH, k_TNH, v_TNH, packing_q, packing_k)
    return padded_attention(q_TNH, k_TNH, v_TNH, packing_q, packing_k, dropout, bias)


@dataclass(frozen=True)
class MaskedRows:
    """Rows of a packed batch that see some keys of their image only, equally many of each image.

    Attributes:
        rows: `(B R,)` int64, R packed rows of each image, image after image.
        visible: `(B, R, longest)` bool, the keys that each sees, by their place in the image.
    """

    rows: Tensor
    visible: Tensor


def masked_attention(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, packing: Packing, masked: MaskedRows) -> Tensor:
    """Apply self-attention within each image in which some rows see some keys only; they must see one at least.

    These rows run padded with their mask, all others by the fastest path without any, so that no mask of all rows by
    all keys is made. Shapes as in `packed_attention`.
    """
    images, rows, _ = masked.visible.shape
    q = q_TNH.index_select(0, masked.rows).unflatten(0, (images, rows)).transpose(1, 2)  # (B, N, R, H)
    k, v = (pad(t, packing).transpose(1, 2) for t in (k_TNH, v_TNH))
    some = F.scaled_dot_product_attention(q, k, v, attn_mask=masked.visible[:, None])
    rest = torch.ones(packing.total, dtype=torch.bool, device=q.device).index_fill(0, masked.rows, False)
    others = rows_where(rest, packing.total - images * rows)
    packing_others = Packing.of([length - rows for length in packing.lengths], q.device)
    unmasked = packed_attention(q_TNH.index_select(0, others), k_TNH, v_TNH, packing_others, packing)
    out = torch.empty_like(q_TNH).index_copy(0, masked.rows, some.transpose(1, 2).flatten(0, 1).to(q_TNH.dtype))
    return out.index_copy(0, others, unmasked.to(q_TNH.dtype))


def _batched(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, images: int, dropout: float, bias: Tensor | None = None
) -> Tensor:
    q, k, v = (
        t.unflatten(0, (images, t.shape[0] // images)).transpose(1, 2) for t in (q_TNH, k_TNH, v_TNH)
    )  # (B, N, t, H)
    attend = _products if q_TNH.dtype == torch.bfloat16 and _products_are_faster(q_TNH.device) else _fused
    of_keys = None if bias is None else bias.view(images, 1, 1, -1)
    return attend(q, k, v, dropout, of_keys).transpose(1, 2).flatten(0, 1)


def _without_padding(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, visible: Tensor, dropout: float, bias: Tensor | None
) -> Tensor:
    """Attend within one image to the keys that are `visible (Tk,)`, whatever finite values the others have."""
    added = torch.where(visible, 0.0 if bias is None else bias, UNSEEN).to(q_TNH.dtype)
    return _batched(q_TNH, k_TNH, v_TNH, 1, dropout, added)


def _fused(q: Tensor, k: Tensor, v: Tensor, dropout: float, bias: Tensor | None = None) -> Tensor:
    """Attend from `(B, N, tq, H)` to keys and values `(B, N, tk, H)`, with torch's fused kernel.

    bias: `(B, 1, 1, tk)`, added to the scores of each key.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


def _products(q: Tensor, k: Tensor, v: Tensor, dropout: float, bias: Tensor | None = None) -> Tensor:
    """Compute the same as two matrix products and a softmax, in pieces whose scores stay in the cache.

    The fused CPU kernel multiplies bf16 at the rate of fp32 where the processor has no matrix tiles (AMX); plain
    products run at the bf16 rate and make attention two to three times faster, forward and backward.
    """
    images, heads, rows, _ = q.shape
    q, k, v = (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    step = max(SCORES_IN_CACHE // max(k.shape[1], 1), 1)
    together = max(step // max(rows, 1), 1)  # heads at once
    of_heads = None if bias is None else bias.expand(images, heads, 1, -1).flatten(0, 1)  # (B N, 1, tk)
    biases = [None] * (images * heads) if of_heads is None else of_heads.split(together)

    if step >= rows:
        pieces = [
            _piece(*each, dropout) for each in zip(q.split(together), k.split(together), v.split(together), biases)
        ]
    else:
        even = -(-rows // -(-rows // step))  # rows of a head in pieces of nearly equal size
        pieces = [
            torch.cat([_piece(some, k_1, v_1, bias_1, dropout) for some in q_1.split(even, 1)], 1)
            for q_1, k_1, v_1, bias_1 in zip(q.split(1), k.split(1), v.split(1), biases)
        ]
    out: Tensor = torch.cat(pieces).unflatten(0, (images, heads))
    return out


def _piece(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attend from some rows of some heads, scaled `(n, t, H)`, to all keys of these heads `(n, tk, H)`."""
    keys = k.transpose(1, 2)
    weights = torch.softmax(torch.bmm(q, keys) if bias is None else torch.baddbmm(bias, q, keys), -1)
    return torch.bmm(F.dropout(weights, dropout) if dropout else weights, v)


@functools.cache
def _products_are_faster(device: torch.device) -> bool:
    has_tiles: bool = torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and not has_tiles


def _loop(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    packing_q: Packing,
    packing_k: Packing,
    dropout: float,
    bias: Tensor | None,
) -> Tensor:
    keys = packing_k.lengths
    biases = [None] * len(keys) if bias is None else bias.split(keys)
    images = zip(q_TNH.split(packing_q.lengths), k_TNH.split(keys), v_TNH.split(keys), biases)
    return torch.cat([_one_image(q, k, v, dropout, own) for q, k, v, own in images])


def _one_image(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, dropout: float, bias: Tensor | None) -> Tensor:
    if k_TNH.shape[0] == 0:
        return _nothing_seen(q_TNH, k_TNH, v_TNH)
    return _batched(q_TNH, k_TNH, v_TNH, 1, dropout, bias)


def _nothing_seen(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
    """Return zeros that depend on all three inputs: with many processes every parameter must take part in backward."""
    return q_TNH * 0 + (k_TNH.sum() + v_TNH.sum()) * 0


def _varlen(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, packing_q: Packing, packing_k: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q_TNH, k_TNH, v_TNH, packing_q.offsets, packing_k.offsets, packing_q.longest, packing_k.longest)
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
    return out


def padded_attention(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    packing_q: Packing,
    packing_k: Packing,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend in `(B, longest)` batches with the padding masked out; the other paths are compared with this one.

    bias: `(Tk,)`, added to the scores of each key.
    """
    q = pad(q_TNH, packing_q).transpose(1, 2)  # (B, N, tq, H)
    k = pad(k_TNH, packing_k).transpose(1, 2)
    v = pad(v_TNH, packing_k).transpose(1, 2)
    if packing_k.longest == 0:
        return _nothing_seen(q_TNH, k_TNH, v_TNH)
    lengths_k = packing_k.offsets.diff()
    visible = torch.arange(k.shape[2], device=k.device) < lengths_k[:, None]  # (B, tk)
    # An image without keys would turn into NaN; let it see padding (zeros), which yields the zeros we promise.
    visible = visible | (lengths_k == 0)[:, None]
    mask = visible if bias is None else torch.where(visible, pad(bias, packing_k), -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=dropout)
    return unpad(out.transpose(1, 2), packing_q)


def segment_matmul(x: Tensor, y: Tensor, packing: Packing) -> Tensor:
    """Multiply the rows of each image by that image's matrix: `x (T, C)`, `y (B, K, C)` to `(T, K)`."""
    if packing.uniform and packing.total > 0:
        batch = x.unflatten(0, (len(packing.lengths), packing.longest))
        return torch.bmm(batch, y.transpose(1, 2)).flatten(0, 1)
    if x.device.type == "cpu":
        return torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(packing.lengths), y)])
    return unpad(torch.bmm(pad(x, packing), y.transpose(1, 2)), packing)


def pad(packed: Tensor, packing: Packing) -> Tensor:
    """Turn packed rows `(T, ...)` into a zero-padded batch `(B, longest, ...)`."""
    rows = padded_rows(packing, packing.longest)
    flat = packed.new_zeros((len(packing.lengths) * packing.longest, *packed.shape[1:]))
    padded: Tensor = flat.index_copy(0, rows, packed).unflatten(0, (len(packing.lengths), packing.longest))
    return padded


def unpad(padded: Tensor, packing: Packing) -> Tensor:
    """Turn a padded batch `(B, longest, ...)` back into packed rows `(T, ...)`."""
    return padded.flatten(0, 1).index_select(0, padded_rows(packing, packing.longest))


def padded_rows(packing: Packing, length: int) -> Tensor:
    """Return the index of each packed row in a batch in which every image has `length` rows: `(T,)` int64."""
    image = packing.image_index()
    starts = packing.offsets[:-1].long().index_select(0, image)
    return torch.arange(packing.total, device=starts.device) - starts + image * length
