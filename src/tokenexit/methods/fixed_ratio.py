"""Fixed ratio: at every exit the same share of each image goes on, the surest tokens leave.

The rival without a threshold: easy and hard pictures cost alike, and the number of tokens in every block follows from
the picture's size alone. All else is DToP's: what the exit heads grade, the canvas, the finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tokenexit.errors import ConfigError
from tokenexit.exits import Score
from tokenexit.methods.base import Method, Model, PerExit, Result, option
from tokenexit.methods.dtop import DToP, DToPState, Finish
from tokenexit.methods.thresholded import NEVER, per_exit
from tokenexit.tokens import Tokens


@dataclass(frozen=True)
class FixedRatio(Method[DToPState]):
    """DToP with a cap and no threshold.

    ratios: for each exit the share of an image's tokens that may go on, of all and not of those still live, rounded
        down; one number is for all exits. The least sure go on, ties by lowest position.
    score, temperature, finish: as in DToP.
    """

    name: ClassVar[str] = "fixed_ratio"
    title: ClassVar[str] = "Fixed ratio"

    ratios: PerExit = option((0.7, 0.5, 0.3), "share of an image's tokens that go on after each exit, as 0.7/0.5/0.3")
    score: Score = option(
        "probability", "score by which the surest leave", choices=("probability", "margin", "entropy")
    )
    temperature: PerExit = option(1.0, "temperature of the exit heads' softmax: 1.5, or 1.8/1.5/1.2")
    finish: Finish = option(
        "auto", "scores of exited tokens in the result", choices=("auto", "presence_last", "frozen")
    )

    def __post_init__(self) -> None:
        values = (self.ratios,) if isinstance(self.ratios, int | float) else self.ratios
        if isinstance(values, str) or not all(isinstance(v, int | float) and 0.0 <= v <= 1.0 for v in values):
            raise ConfigError(f"ratios={self.ratios!r} is no share in [0, 1] for each exit: give those that go on.")
        self._dtop(())

    def _dtop(self, cap: tuple[float, ...]) -> DToP:
        return DToP(NEVER, score=self.score, temperature=self.temperature, finish=self.finish, cap=cap)

    def _for(self, model: Model) -> DToP:
        return self._dtop(per_exit(self.ratios, model.num_exits, "ratios"))

    def curve(self, points: int, num_exits: int) -> Sequence[Method[Any]]:
        """Shares between all tokens and none, falling alike from exit to exit."""
        shares = [1 - i / (points + 1) for i in range(1, points + 1)]
        ratios = [tuple(round(share ** (n + 1), 4) for n in range(num_exits)) for share in shares]
        return [replace(self, ratios=each) for each in ratios]

    def for_export(self) -> Method[Any]:
        self.refuse("a cap counts tokens on the host and cannot be exported: export dense, dtop or dovit.")

    def check(self, model: Model) -> None:
        self._for(model).check(model)

    def start(self, tokens: Tokens, model: Model) -> DToPState:
        return self._for(model).start(tokens, model)

    def at_exit(self, n: int, tokens: Tokens, state: DToPState, model: Model) -> tuple[Tokens, DToPState]:
        return self._for(model).at_exit(n, tokens, state, model)

    def result(self, tokens: Tokens, state: DToPState, model: Model) -> Result:
        return self._for(model).result(tokens, state, model)
