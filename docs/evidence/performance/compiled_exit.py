"""Is an exit faster when its head, softmax and best class are one compiled graph? FCN heads, DToP, one thread.

    python -m docs.evidence.performance.compiled_exit quickstart fp32
    python -m docs.evidence.performance.compiled_exit tiny-660 bf16

Both take turns in one process; milliseconds are of the thread's own CPU, medians: of an exit with its products, and of
the whole call.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.exit_cost import LEAVING, METHODS, SHAPES, cpu_ms, some
from torch import Tensor

from tokenexit.engine.tokens import Tokens
from tokenexit.heads import HeadOutput
from tokenexit.heads.pointwise import FCNHead
from tokenexit.methods import DToP
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import inference

ROUNDS, CALLS = 4, 20


@torch.compile(dynamic=True)
def answered(head: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = head.classifier(torch.relu(head.norm(head.proj(x))))
    score, label = logits.float().softmax(-1).max(-1)
    return logits, score, label


def main() -> None:
    keep_buffers()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (model, image), precision = SHAPES[sys.argv[1]](), sys.argv[2]
    last: list[tuple[Tensor, Tensor]] = []
    spent: list[float] = []
    at_exit = DToP.at_exit

    def forward(head: FCNHead, tokens: Tokens) -> HeadOutput:
        logits, *graded = answered(head, tokens.x)
        last[:] = [(graded[0], graded[1])]
        return HeadOutput(logits, tokens.packing)

    def timed(*args: Any) -> Any:
        start = time.thread_time()
        result = at_exit(*args)
        spent.append(1e3 * (time.thread_time() - start))
        return result

    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with inference(torch.device("cpu"), precision), patch.object(DToP, "at_exit", timed):  # type: ignore[arg-type]
        method = some(model, image, METHODS["dtop"], LEAVING)
        for turn in range(ROUNDS + 1):  # the first compiles
            for name in ("eager", "compiled"):
                with ExitStack() as stack:
                    if name == "compiled":
                        stack.enter_context(patch.object(FCNHead, "forward", forward))
                        stack.enter_context(patch.object(DToP, "grade", lambda *_: last[0]))
                    for _ in range(CALLS):
                        spent.clear()
                        took = cpu_ms(partial(model, [image], method))
                        if turn:
                            found[name]["call"].append(took)
                            found[name]["exit"] += spent
    for name, times in found.items():
        print(f"{name}: exit {median(times['exit']):.2f} ms, call {median(times['call']):.1f} ms")


if __name__ == "__main__":
    main()
