"""Batch normalisation with statistics over all processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenexit.heads.base import GridBatchNorm, TokenBatchNorm


class SyncedBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm for heads that may see no token, on one process or on all.

    As with `TokenBatchNorm`, fewer than two tokens, here of all processes together, have no variance and are
    normalised with the running statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = torch.tensor(input.numel() // input.shape[1], device=input.device)
        torch.distributed.all_reduce(values)
        if values < 2:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        # Statistics are sent in fp32 by processes with tokens, in the input's precision by those without.
        return super().forward(input.float()).to(input.dtype)


def synchronise_batch_norms(model: nn.Module) -> None:
    """Replace the heads' batch norms; names and values stay. Every process must call every head equally often."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, TokenBatchNorm | GridBatchNorm):
                synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
                synced.load_state_dict(norm.state_dict())
                setattr(parent, name, synced)
