"""Pictures of many requests in one batch: a bounded queue, one thread that runs the model, a future for each picture.

The engine is exact: a picture's result does not depend on its companions, so whoever comes at the same time and asks
for the same method shares a call of the model. A queue that is full refuses at once; waiting longer would help nobody.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from tokenexit.ledger import Size
from tokenexit.methods import Method
from tokenexit.windows import PACK_TOKENS, Segmentation

Forward: TypeAlias = Callable[[Sequence[Tensor], Method[Any], Sequence[Size]], Segmentation]


class Overloaded(Exception):
    """The queue is full: come back later."""


class Expired(Exception):
    """The time for an answer was over before its turn came."""


@dataclass(frozen=True)
class Answer:
    """The result of one picture. milliseconds: of the call of the model it ran in, with `batch` pictures."""

    output: Segmentation
    milliseconds: float
    batch: int


@dataclass(frozen=True, eq=False)
class Job:
    """One picture to segment. image: `(3, H, W)`. target: size of its maps. tokens: what it weighs in a batch.

    deadline: on the monotonic clock, after which nobody wants the answer.
    """

    image: Tensor
    method: Method[Any]
    target: Size
    tokens: int
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Answer] = field(default_factory=Future)

    def goes_with(self, other: Job) -> bool:
        """Whether both may share a batch; not where a method looks beyond the picture (DoViT's release mode)."""
        return self.method == other.method and self.method.batch_independent


class Batcher:
    """Runs jobs in one thread, those that fit together at once.

    forward: the model. max_tokens: patch tokens of a batch; a larger picture runs alone. max_places: pictures that may
    be under way at once. max_wait: seconds the first picture of a batch waits for companions. observe: told of each
    batch its number of pictures and its seconds. around: held by the thread for as long as it lives.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_tokens: int = PACK_TOKENS,
        max_places: int = 64,
        max_wait: float = 0.004,
        observe: Callable[[int, float], None] = lambda pictures, seconds: None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._forward, self._observe, self._around = forward, observe, around
        self._max_tokens, self._max_places, self._max_wait = max_tokens, max_places, max_wait
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._taken = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tokenexit-batches", daemon=True)
        self._thread.start()

    @property
    def taken(self) -> int:
        """Pictures under way: read, waiting, running or being encoded."""
        return self._taken

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold room for pictures from reading them to answering, so that all memory they need is bounded.

        Raises `Overloaded` where there is none.
        """
        with self._changed:
            if self._taken + count > self._max_places:
                raise Overloaded
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count

    def submit(self, job: Job) -> Future[Answer]:
        """Queue a picture. Its future raises what the model raised, or `Expired`."""
        with self._changed:
            if self._closed:
                raise Overloaded
            self._queue.append(job)
            self._changed.notify_all()
        return job.answer

    def close(self) -> None:
        """Finish what is queued, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        with self._around():
            while jobs := self._next():
                self._run([job for job in jobs if _wanted(job)])

    def _next(self) -> list[Job]:
        """The oldest job and those that go with it; empty at the end."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                return []
            until = self._queue[0].arrived + self._max_wait
            while not self._closed and self._pack()[1] and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            jobs, _ = self._pack()
            self._queue = deque(job for job in self._queue if job not in jobs)
            return jobs

    def _pack(self) -> tuple[list[Job], bool]:
        """Jobs for the next batch, in their order, and whether there is room for more."""
        first, *others = self._queue
        jobs, tokens = [first], first.tokens
        for job in others:
            if job.goes_with(first):
                tokens += job.tokens
                if tokens > self._max_tokens:
                    return jobs, False
                jobs.append(job)
        return jobs, tokens < self._max_tokens

    def _run(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        start = time.perf_counter()
        try:
            images, targets = [job.image for job in jobs], [job.target for job in jobs]
            output = self._forward(images, jobs[0].method, targets)
            seconds = time.perf_counter() - start
            outputs = [output[n] for n in range(len(jobs))]
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
                return
            for job in jobs:  # one picture that fails does not take the others with it
                self._run([job])
            return
        self._observe(len(jobs), seconds)
        for job, own in zip(jobs, outputs):
            job.answer.set_result(Answer(own, 1e3 * seconds, len(jobs)))


def _wanted(job: Job) -> bool:
    """False for a job that was cancelled or comes too late, which is told so."""
    if not job.answer.set_running_or_notify_cancel():
        return False
    if time.monotonic() > job.deadline:
        job.answer.set_exception(Expired())
        return False
    return True
