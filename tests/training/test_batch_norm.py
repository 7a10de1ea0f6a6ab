"""Batch statistics over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import random_image, tiny_segmenter
from tests.training.driver import free_port
from tokenexit.heads.base import TokenBatchNorm
from tokenexit.training.batch_norm import SyncedBatchNorm, synchronise_batch_norms

TOKENS = (5, 0), (3, 4), (1, 1), (1, 0), (0, 0)
"""Tokens that each of two processes sees, step after step."""


@pytest.mark.parametrize("head", ["fcn", "dinov2_linear", "setr_pup"])
def test_synchronised_models_keep_names_values_and_predictions(head: str) -> None:
    model, images = tiny_segmenter(head), random_image(12, 16)[None]
    before, said = {name: value.clone() for name, value in model.state_dict().items()}, model(images).logits
    synchronise_batch_norms(model)
    model.eval()
    assert not any(type(m).__name__ in ("TokenBatchNorm", "GridBatchNorm") for m in model.modules())
    assert sum(isinstance(m, SyncedBatchNorm) for m in model.modules()) >= 3
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(model(images).logits, said)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("tokens", [0, 1])
def test_fewer_than_two_tokens_of_all_processes_take_the_running_statistics(tokens: int) -> None:
    norm = SyncedBatchNorm(4).train()
    assert norm.running_mean is not None
    nn.init.normal_(norm.running_mean)
    x = torch.randn(tokens, 4, requires_grad=True)
    running = norm.running_mean.clone()
    out = norm(x)
    assert torch.equal(norm.running_mean, running)
    torch.testing.assert_close(out, (x - running) / (1 + norm.eps) ** 0.5)
    out.sum().backward()
    assert norm.weight.grad is not None


def share(rank: int, port: str, out: str) -> None:
    """What one of two processes on one GPU makes of its tokens."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    norm, seen = SyncedBatchNorm(4).cuda().train(), []
    for step, counts in enumerate(TOKENS):
        x = batch(step)[sum(counts[:rank]) : sum(counts[: rank + 1])].cuda().requires_grad_()
        y = norm(x)
        (y.square() * torch.arange(4, device="cuda")).sum().backward()
        seen.append((y.detach().cpu(), torch.zeros(0, 4) if x.grad is None else x.grad.cpu()))
    state = {name: value.cpu() for name, value in norm.state_dict().items()}
    torch.save({"seen": seen, "state": state}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def batch(step: int) -> torch.Tensor:
    return torch.randn(sum(TOKENS[step]), 4, generator=torch.Generator().manual_seed(step))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_two_processes_normalise_as_one_with_all_their_tokens(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = TokenBatchNorm(4).train()
    for step in range(len(TOKENS)):
        x = batch(step).requires_grad_()
        y = alone(x)
        (y.square() * torch.arange(4)).sum().backward()
        for i, expected in enumerate((y.detach(), x.grad)):
            together = torch.cat([first["seen"][step][i], second["seen"][step][i]])
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(first["state"][name], getattr(alone, name))
        assert torch.equal(first["state"][name], second["state"][name])
