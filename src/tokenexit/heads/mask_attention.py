"""Mask attention, in training only: a query sees the patches that its own mask covers (Cheng et al., 2022; EoMT).

Legend: B images, Q queries, h x w patches of an image, T tokens of the batch, P live patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenexit.engine.attention import MaskedRows, pad
from tokenexit.engine.tokens import Packing, Tokens


@torch.no_grad()
def mask_attention(mask_logits: Sequence[Tensor], joined: Tokens, queries: int, share: float) -> MaskedRows:
    """Return what the queries of a joint block see: all prefix tokens and queries, and the live patches of their masks.

    Args:
        mask_logits: of each image, `(Q, H, W)` at any multiple of its grid; resized to it, a patch is in a mask if its
            logit is positive.
        joined: live tokens in which the Q queries stand last among the prefix tokens of every image.
        queries: number Q of queries.
        share: probability with which a query's mask applies; others see all. Drawn for each query and image from
            torch's random state.

    Returns:
        The rows of the queries and the keys that each sees. A query whose mask is empty still sees prefix and queries.
    """
    images, device = len(joined.grids), joined.x.device
    canvas = torch.cat(
        [
            (F.interpolate(logits[None].float(), grid, mode="bilinear", align_corners=False)[0] > 0).flatten(1).T
            for logits, grid in zip(mask_logits, joined.grids)
        ]
    )  # (cells, Q)
    free = torch.rand(images, queries, device=device) >= share
    live = Packing.of(joined.live, device)
    covered = canvas.index_select(0, joined.position.index_select(0, joined.patch_index()))  # (P, Q)
    seen = covered | free.index_select(0, live.image_index())
    patches = pad(seen, live).transpose(1, 2)  # (B, Q, longest), False beyond the image
    prefix = torch.ones(images, queries, joined.num_prefix, dtype=torch.bool, device=device)
    rows = joined.prefix_index().unflatten(0, (images, joined.num_prefix))[:, -queries:].flatten()
    return MaskedRows(rows, torch.cat([prefix, patches], dim=2))
