"""Batching of images of many requests: a bounded queue, one thread that runs the model, a future for each image.

The engine is exact: the result of an image does not depend on its batch, so requests for the same method that arrive
together share a call of the model. A full queue refuses at once.

An expensive request, of more than a second, runs alone. Before each of its blocks, cheap requests that wait get three
times as long as its last block took, so that they lose a quarter of the model to it. A call that nobody waits for ends
before its next block.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from tokenexit.methods import Method
from tokenexit.outputs.ledger import Size
from tokenexit.outputs.windows import PACK_TOKENS, Segmentation

Forward: TypeAlias = Callable[[Sequence[Tensor], Method[Any], Sequence[Size]], Segmentation]


EXPENSIVE = 1.0
"""Expected seconds above which a request is expensive and runs alone, and up to which requests share a call."""

GIVEN = 3.0
"""Time of cheap requests between the blocks of an expensive one, as a multiple of the time of a block."""


class Overloaded(Exception):
    """The queue is full: come back later."""


class Expired(Exception):
    """The time limit passed before the request had its turn."""


class Stopped(Exception):
    """Nobody waits for the call that was running."""


@dataclass(frozen=True)
class Answer:
    """The result of one image. milliseconds: of the call of the model it ran in, with `batch` images."""

    output: Segmentation
    milliseconds: float
    batch: int


@dataclass(frozen=True, eq=False)
class SegmentationRequest:
    """One image to segment. image: `(3, H, W)`. target: size of its maps. tokens: their number in a batch.

    deadline: on the monotonic clock, after which nobody wants the answer. seconds: what it is expected to take.
    gone: set when nobody waits for the answer any more.
    """

    image: Tensor
    method: Method[Any]
    target: Size
    tokens: int
    deadline: float
    seconds: float = 0.0
    gone: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Answer] = field(default_factory=Future)

    def goes_with(self, other: SegmentationRequest) -> bool:
        """Return whether both may share a batch; not where results depend on the batch (DoViT's release mode)."""
        alone = self.expensive or other.expensive or not self.method.batch_independent
        return self.method == other.method and not alone

    @property
    def expensive(self) -> bool:
        return self.seconds > EXPENSIVE

    @property
    def wanted(self) -> bool:
        return not self.gone.is_set() and time.monotonic() <= self.deadline


@dataclass
class _Call:
    """A running call of the model. since: when it last had its turn. given: seconds in which it gave way."""

    jobs: Sequence[SegmentationRequest]
    start: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)
    given: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(job.seconds for job in self.jobs)


class Batcher:
    """Run requests in one thread, in batches of those that fit together.

    forward: the model. max_tokens: patch tokens of a batch; a larger image runs alone. max_slots: images that may
    be under way at once. max_wait: seconds the first image of a batch waits for companions. observe: told of each
    batch its output and its seconds. around: held by the thread for as long as it lives.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_tokens: int = PACK_TOKENS,
        max_slots: int = 64,
        max_wait: float = 0.004,
        observe: Callable[[Segmentation, float], None] = lambda output, seconds: None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._forward, self._observe, self._around = forward, observe, around
        self._max_tokens, self._max_slots, self._max_wait = max_tokens, max_slots, max_wait
        self._queue: deque[SegmentationRequest] = deque()
        self._changed = threading.Condition()
        self._calls: list[_Call] = []  # the last one runs; one before it gives way
        self._taken = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tokenexit-batches", daemon=True)
        self._thread.start()

    @property
    def taken(self) -> int:
        """The number of images that are read, waiting, running or being encoded."""
        return self._taken

    @contextmanager
    def slots(self, count: int) -> Iterator[None]:
        """Hold room for images from reading them to answering, so that all memory they need is bounded.

        Raises `Overloaded` where there is none.
        """
        with self._changed:
            if self._taken + count > self._max_slots:
                raise Overloaded
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()

    def submit(self, job: SegmentationRequest) -> Future[Answer]:
        """Queue an image. Its future raises what the model raised, or `Expired`."""
        with self._changed:
            if self._closed:
                raise Overloaded
            self._queue.append(job)
            self._changed.notify_all()
        return job.answer

    def wait(self, seconds: float = 0.0) -> float:
        """Estimate the seconds until a request of so many seconds would have its turn if it came now."""
        with self._changed:
            now, queue, calls = time.monotonic(), list(self._queue), list(self._calls)
        expensive = any(job.expensive for job in queue) or any(call.jobs[0].expensive for call in calls)
        waiting = [job.seconds for job in queue if job.wanted]
        running = [max(0.0, call.seconds - (now - call.start - call.given)) for call in calls]
        if seconds > EXPENSIVE:
            return sum(waiting) + sum(running)
        cheap = sum(job.seconds for job in queue if not job.expensive and job.wanted)
        cheap += sum(rest for call, rest in zip(calls, running) if not call.jobs[0].expensive)
        return cheap * (1 + 1 / GIVEN if expensive else 1)

    @property
    def running_seconds(self) -> float:
        """The seconds that the running call has taken so far."""
        calls = list(self._calls)
        return time.monotonic() - calls[0].start if calls else 0.0

    def close(self, seconds: float | None = None) -> None:
        """Finish the queue and end. seconds: the longest wait for that."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def between(self) -> None:
        """Let a call end or give way; to be called before every block of the model.

        Raises `Stopped` where nobody waits for the call under way. Does nothing in threads that are not the batcher's.
        """
        if threading.current_thread() is not self._thread or not self._calls:
            return
        call = self._calls[-1]
        if not any(job.wanted for job in call.jobs):
            raise Stopped
        if not call.jobs[0].expensive:
            return
        start = time.monotonic()
        until = start + GIVEN * (start - call.since)
        while (left := until - time.monotonic()) > 0 and (jobs := self._cheap(left)) is not None:
            self._run(jobs)
        call.since = time.monotonic()
        call.given += call.since - start

    def _work(self) -> None:
        with self._around():
            while jobs := self._next():
                self._run(jobs)

    def _next(self) -> list[SegmentationRequest]:
        """Return the oldest request and those that go with it; empty at the end."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                return []
            until = self._queue[0].arrived + self._max_wait
            while not self._closed and self._pack(self._queue)[1] and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._taken_out(self._pack(self._queue)[0])

    def _cheap(self, seconds: float) -> list[SegmentationRequest] | None:
        """Return the oldest cheap request and those that go with it.

        Empty if none came in so many seconds, in which images are being read or encoded, which takes the same
        processor; None if there are no such images.
        """
        with self._changed:
            waiting = [job for job in self._queue if not job.expensive]
            if waiting:
                return self._taken_out(self._pack(waiting)[0])
            if self._taken <= len(self._queue) + 1:  # all that is under way is expensive: this call, and what is queued
                return None
            self._changed.wait(seconds)
            return []

    def _taken_out(self, jobs: list[SegmentationRequest]) -> list[SegmentationRequest]:
        self._queue = deque(job for job in self._queue if job not in jobs)
        return jobs

    def _pack(self, queue: Iterable[SegmentationRequest]) -> tuple[list[SegmentationRequest], bool]:
        """Return the requests of the next batch, in order, and whether there is room for more."""
        first, *others = queue
        jobs, tokens, seconds = [first], first.tokens, first.seconds
        for job in others:
            if job.goes_with(first):
                tokens, seconds = tokens + job.tokens, seconds + job.seconds
                if tokens > self._max_tokens or seconds > EXPENSIVE:
                    return jobs, False
                jobs.append(job)
        return jobs, tokens < self._max_tokens and not first.expensive

    def _run(self, queued: Sequence[SegmentationRequest]) -> None:
        jobs = [job for job in queued if _wanted(job)]
        if jobs:
            self._call(jobs)

    def _call(self, jobs: Sequence[SegmentationRequest]) -> None:
        call = _Call(jobs)
        self._calls.append(call)
        try:
            images, targets = [job.image for job in jobs], [job.target for job in jobs]
            output = self._forward(images, jobs[0].method, targets)
            seconds = time.monotonic() - call.start - call.given
            outputs = [output[n] for n in range(len(jobs))]
        except Exception as error:
            self._calls.pop()
            self._failed(jobs, error)
            return
        self._calls.pop()
        self._observe(output, seconds)
        for job, own in zip(jobs, outputs):
            job.answer.set_result(Answer(own, 1e3 * seconds, len(jobs)))

    def _failed(self, jobs: Sequence[SegmentationRequest], error: Exception) -> None:
        if isinstance(error, Stopped):
            for job in jobs:
                job.answer.set_exception(Expired())
        elif len(jobs) == 1:
            jobs[0].answer.set_exception(error)
        else:
            for job in jobs:  # one image that fails does not take the others with it
                self._call([job])


def _wanted(job: SegmentationRequest) -> bool:
    """Return False for a request that was cancelled or is too late, and answer it."""
    if not job.answer.set_running_or_notify_cancel():
        return False
    if not job.wanted:
        job.answer.set_exception(Expired())
        return False
    return True
