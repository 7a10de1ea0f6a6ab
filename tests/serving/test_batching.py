"""Jobs that come together run together, in bounds, and each gets its own answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_segmenter
from tokenexit.methods import Dense, DoViT, DToP, Method
from tokenexit.serving.batching import EXPENSIVE, GIVEN, Batcher, Expired, Overloaded, SegmentationRequest

SOON = 60.0


class Model:
    """Answers with the images themselves; holds each call back until `go` is set. calls: what it was given."""

    def __init__(self, go: bool = True) -> None:
        self.calls: list[tuple[list[float], Method[Any]]] = []
        self.started = threading.Event()
        self.go = threading.Event()
        if go:
            self.go.set()

    def __call__(self, images: Sequence[Tensor], method: Method[Any], targets: Sequence[Any]) -> Any:
        self.calls.append(([image.item() for image in images], method))
        self.started.set()
        assert self.go.wait(20)
        if any(image.item() < 0 for image in images):
            raise MemoryError
        return list(images)


def job(
    number: float, method: Method[Any] | None = None, tokens: int = 10, seconds: float = SOON
) -> SegmentationRequest:
    method = DToP() if method is None else method
    return SegmentationRequest(torch.tensor(number), method, (1, 1), tokens, time.monotonic() + seconds)


@pytest.fixture
def held() -> Iterator[Model]:
    """A model that is busy with job 0 until told to go on, so that others gather meanwhile."""
    model = Model(go=False)
    yield model
    model.go.set()


def gathered(model: Model, jobs: Sequence[SegmentationRequest], **options: Any) -> Batcher:
    """A batcher that is busy, with `jobs` in its queue."""
    batcher = Batcher(model, max_wait=0.0, **options)  # type: ignore[arg-type]
    batcher.submit(job(0))
    assert model.started.wait(20)
    for one in jobs:
        batcher.submit(one)
    return batcher


def test_jobs_of_one_method__share_a_call_in_their_order(held: Model) -> None:
    jobs = [job(1), job(2, Dense()), job(3), job(4, DToP(0.5)), job(5)]
    with closing(gathered(held, jobs)):
        held.go.set()
        answers = [one.answer.result(20) for one in jobs]
    assert [numbers for numbers, _ in held.calls] == [[0.0], [1.0, 3.0, 5.0], [2.0], [4.0]]
    assert [method for _, method in held.calls][1:] == [DToP(), Dense(), DToP(0.5)]
    assert [answer.output for answer in answers] == [1, 2, 3, 4, 5]
    assert [answer.batch for answer in answers] == [3, 1, 3, 1, 3]


def test_a_batch__holds_no_more_tokens_than_it_may(held: Model) -> None:
    jobs = [job(1, tokens=60), job(2, tokens=40), job(3, tokens=500), job(4, tokens=1)]
    with closing(gathered(held, jobs, max_tokens=100)):
        held.go.set()
        for one in jobs:
            one.answer.result(20)
    assert [numbers for numbers, _ in held.calls[1:]] == [[1.0, 2.0], [3.0], [4.0]]


def test_the_release_mode_of_dovit__runs_every_image_alone(held: Model) -> None:
    jobs = [job(n, DoViT(batch_mode="mean")) for n in (1, 2)]
    with closing(gathered(held, jobs)):
        held.go.set()
        for one in jobs:
            one.answer.result(20)
    assert [numbers for numbers, _ in held.calls[1:]] == [[1.0], [2.0]]


def test_the_first_of_a_batch__waits_for_others() -> None:
    model = Model()
    with closing(Batcher(model, max_wait=20.0, max_tokens=20)) as batcher:  # type: ignore[arg-type]
        first = batcher.submit(job(1))
        second = batcher.submit(job(2))  # now it is full, and nobody waits any longer
        assert first.result(10).batch == second.result(10).batch == 2


def test_one_that_fails__does_not_take_the_others_with_it(held: Model) -> None:
    jobs = [job(1), job(-2), job(3)]
    with closing(gathered(held, jobs)):
        held.go.set()
        assert jobs[0].answer.result(20).output == 1
        assert jobs[2].answer.result(20).output == 3
        with pytest.raises(MemoryError):
            jobs[1].answer.result(20)


def test_a_job_that_nobody_waits_for__is_not_run(held: Model) -> None:
    late, gone, wanted = job(1, seconds=-1.0), job(2), job(3)
    with closing(gathered(held, [late, gone, wanted])):
        assert gone.answer.cancel()
        held.go.set()
        assert wanted.answer.result(20).batch == 1
        with pytest.raises(Expired):
            late.answer.result(20)
    assert [numbers for numbers, _ in held.calls[1:]] == [[3.0]]


def test_places__are_bounded_and_given_back() -> None:
    with closing(Batcher(Model(), max_slots=3)) as batcher:  # type: ignore[arg-type]
        with batcher.slots(2):
            with pytest.raises(Overloaded), batcher.slots(2):
                pass
            with batcher.slots(1):
                assert batcher.taken == 3
        assert batcher.taken == 0


def test_close__answers_what_is_queued_and_takes_no_more(held: Model) -> None:
    jobs = [job(1), job(2)]
    batcher = gathered(held, jobs)
    threading.Timer(0.05, held.go.set).start()
    batcher.close()
    assert all(one.answer.done() for one in jobs)
    with pytest.raises(Overloaded):
        batcher.submit(job(3))


def test_observe__is_told_of_every_batch(held: Model) -> None:
    seen: list[int] = []
    jobs = [job(1), job(2)]
    with closing(gathered(held, jobs, observe=lambda output, seconds: seen.append(len(output)))):
        held.go.set()
        jobs[1].answer.result(20)
    assert seen == [1, 2]


@pytest.mark.parametrize("method", [Dense(), DToP(0.6), DoViT(0.6)], ids=lambda m: m.name)
def test_a_batch__gives_what_single_runs_give(method: Method[Any]) -> None:
    model = tiny_segmenter()

    @torch.inference_mode()
    def forward(images: Sequence[Tensor], chosen: Method[Any], targets: Sequence[tuple[int, int]]) -> Any:
        return model.segment(images, chosen, targets)

    images = [torch.randn(3, h, w) for h, w in ((12, 16), (9, 14), (12, 16), (20, 8))]
    targets = [(12, 16), (18, 28), (6, 8), (20, 8)]
    with closing(Batcher(forward, max_wait=5.0, max_tokens=12 + 12 + 12 + 10)) as batcher:
        jobs = [
            SegmentationRequest(*one, tokens=1, deadline=time.monotonic() + SOON)
            for one in zip(images, [method] * 4, targets)
        ]
        jobs[-1] = SegmentationRequest(images[3], method, targets[3], tokens=46, deadline=time.monotonic() + SOON)
        answers = [future.result(30) for future in [batcher.submit(one) for one in jobs]]
    assert max(answer.batch for answer in answers) > 1
    for image, target, answer in zip(images, targets, answers):
        alone = forward([image], method, [target])
        torch.testing.assert_close(answer.output.logits, alone.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(answer.output.exit_index[0], alone.exit_index[0])
        assert answer.output.ledger == alone.ledger


class Blocks:
    """A model of several blocks that asks the batcher before each, as the server's hooks do. ran: images, by block."""

    def __init__(self, blocks: int = 4, seconds: float = 0.05) -> None:
        self.blocks, self.seconds = blocks, seconds
        self.ran: list[float] = []
        self.batcher: Batcher | None = None
        self.entered = threading.Event()

    def __call__(self, images: Sequence[Tensor], method: Method[Any], targets: Sequence[Any]) -> Any:
        for _ in range(self.blocks):
            assert self.batcher is not None
            self.batcher.between()
            self.entered.set()
            time.sleep(self.seconds if images[0].item() >= 100 else 0.0)
            self.ran.append(images[0].item())
        return list(images)


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    model = Blocks()
    with closing(Batcher(model, max_wait=0.0)) as batcher:  # type: ignore[arg-type]
        model.batcher = batcher
        yield model


def priced(number: float, seconds: float) -> SegmentationRequest:
    one = job(number)
    return replace(one, seconds=seconds)


def test_a_dear_job__gives_way_between_its_blocks_and_ends(blocks: Blocks) -> None:
    assert blocks.batcher is not None
    expensive = blocks.batcher.submit(priced(100, 2 * EXPENSIVE))
    assert blocks.entered.wait(20)
    cheap = blocks.batcher.submit(priced(1, 0.001))
    assert cheap.result(20).output == 1
    assert not expensive.done()
    answer = expensive.result(20)
    assert answer.output == 100
    assert blocks.ran == [100.0, *[1.0] * 4, *[100.0] * 3]
    assert answer.milliseconds >= 1e3 * 4 * 0.05


def test_a_dear_job__is_not_starved_by_those_it_gives_way_to() -> None:
    model = Blocks(blocks=6)
    with closing(Batcher(model, max_wait=0.0)) as batcher:  # type: ignore[arg-type]
        model.batcher = batcher
        expensive = batcher.submit(priced(100, 2 * EXPENSIVE))
        assert model.entered.wait(20)
        others = [batcher.submit(priced(100 + n, EXPENSIVE)) for n in range(1, 20)]  # as long as the other
        expensive.result(20)
        assert sum(one.done() for one in others) < 12
        for one in others:
            one.result(60)


def test_dear_jobs__run_alone_and_do_not_give_way_to_each_other(held: Model) -> None:
    jobs = [priced(1, 2 * EXPENSIVE), priced(2, 2 * EXPENSIVE), priced(3, 0.6), priced(4, 0.6), priced(5, 0.3)]
    with closing(gathered(held, jobs)) as batcher:
        assert batcher.wait() == pytest.approx(1.5 * (1 + 1 / GIVEN))
        assert batcher.wait(2 * EXPENSIVE) == pytest.approx(4 * EXPENSIVE + 1.5)
        held.go.set()
        for one in jobs:
            one.answer.result(20)
        assert batcher.wait(2 * EXPENSIVE) == 0
    assert [numbers for numbers, _ in held.calls[1:]] == [[1.0], [2.0], [3.0], [4.0, 5.0]]


def test_a_call_that_nobody_waits_for__ends_before_its_next_block(blocks: Blocks) -> None:
    assert blocks.batcher is not None
    left = priced(100, 0.2)
    future = blocks.batcher.submit(left)
    assert blocks.entered.wait(20)
    left.gone.set()
    with pytest.raises(Expired):
        future.result(20)
    assert len(blocks.ran) < 4
    assert blocks.batcher.running_seconds == 0


def test_a_call_whose_time_is_over__ends_before_its_next_block(blocks: Blocks) -> None:
    assert blocks.batcher is not None
    late = replace(priced(100, 0.2), deadline=time.monotonic() + 0.06)
    with pytest.raises(Expired):
        blocks.batcher.submit(late).result(20)
    assert 1 <= len(blocks.ran) < 4
    assert blocks.batcher.submit(priced(1, 0.0)).result(20).output == 1


def test_between__does_nothing_in_other_threads(blocks: Blocks) -> None:
    assert blocks.batcher is not None
    blocks.batcher.between()


def test_a_dear_job__gives_way_to_images_that_are_being_read(blocks: Blocks) -> None:
    """Reading and encoding take the same processor."""
    assert blocks.batcher is not None
    with blocks.batcher.slots(1):
        expensive = blocks.batcher.submit(priced(100, 2 * EXPENSIVE))
        alone = expensive.result(20).milliseconds
        with blocks.batcher.slots(1):
            start = time.monotonic()
            expensive = blocks.batcher.submit(priced(100, 2 * EXPENSIVE))
            assert expensive.result(20).milliseconds < 4 * alone  # pauses are not counted
            assert 1e3 * (time.monotonic() - start) > 1e3 * (4 + 3 * GIVEN) * 0.05
