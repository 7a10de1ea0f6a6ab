"""The canvas on which heads write in turn."""

import pytest
import torch

from tokenexit.methods.base import Canvas


@pytest.mark.parametrize("grad", [False, True])
def test_canvas__holds_the_last_row_written_and_leaves_its_tensors_alone(grad):
    rows, first, second = torch.zeros(4, 1), torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[9.0]])
    with torch.set_grad_enabled(grad):
        canvas = Canvas(rows).write(torch.tensor([0, 1, 3]), first).write(torch.tensor([1]), second)
        assert canvas.read().flatten().tolist() == [1, 9, 0, 3]
        assert canvas.read().flatten().tolist() == [1, 9, 0, 3]
    assert rows.flatten().tolist() == [0, 0, 0, 0]
    assert first.flatten().tolist() == [1, 2, 3]


def test_canvas__takes_one_number_for_many_cells():
    canvas = Canvas(torch.full((4,), 7)).write(torch.arange(3), 0).write(torch.tensor([1]), 1)
    assert canvas.read().tolist() == [0, 1, 0, 7]


def test_canvas__detached_stops_gradients_of_what_was_written():
    value = torch.ones(1, 1, requires_grad=True)
    canvas = Canvas(torch.zeros(2, 1)).write(torch.tensor([0]), value)
    assert canvas.read().requires_grad
    assert not canvas.detached().read().requires_grad
