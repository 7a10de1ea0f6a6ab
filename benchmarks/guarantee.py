"""Check the guarantee with many calibrations, drawn from one pool of scenes whose true risk is known.

    python -m benchmarks.guarantee --out runs/guarantee --plot docs/evidence/calibration/guarantee.png

A small model is trained on small scenes; a path of thresholds is fixed on scenes of their own. The network then runs
once for every place of the path over the pool, and its losses per image are kept. A calibration draws `--draws-of`
images from the pool, with replacement, walks the path as `tokenexit calibrate` does, and is judged by the mean loss of
the whole pool at the place where it ended, which is the true risk of such draws: it *violates* its bound if that is
above it. The share of violations must not exceed 1 - confidence by more than binomial noise.

Interrupted, it goes on where it was: model, path and every place are kept in `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import bar, open_notebook
from tokenexit.calibration import risk_control
from tokenexit.calibration.calibration_set import CalibrationSet, dense_reference, error, true_run
from tokenexit.calibration.for_bound import SequentialTest, positions_to_test
from tokenexit.calibration.planner import Planner
from tokenexit.calibration.targets import Bound
from tokenexit.data.base import Sample, SegmentationDataset
from tokenexit.data.scenes import Scenes
from tokenexit.methods import DToP, build_method, spec_of
from tokenexit.runtime.atomic import write_or_refuse
from tokenexit.runtime.notebook import Notebook
from tokenexit.segmenter import ExitSegmenter
from tokenexit.training.config import DataConfig
from tokenexit.training.loop import train
from tokenexit.training.recipes import scene_recipe

POOL_SEED, PATH_SEED = 71, 72
POSITIONS = 16


class Remembered:
    """Scenes that are drawn once: small ones take as long to draw as to segment."""

    def __init__(self, data: SegmentationDataset) -> None:
        self.data, self.labels = data, data.labels
        self.sample = lru_cache(maxsize=None)(data.__getitem__)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int, /) -> Sample:
        return self.sample(index)


def trained(out: Path, size: tuple[int, int], steps: int) -> ExitSegmenter:
    """The quickstart's model on scenes of this size; trained once."""
    if not (out / "config.json").exists():
        recipe = scene_recipe(out, steps, "fp32", seed=0)
        data = DataConfig(name="scenes", options={"length": 100_000, "size": size}, crop=size, ratio=(1.0, 1.5))
        options = {**recipe.model.options, "pos_embed_grid": [size[0] // 8, size[1] // 8]}
        train(replace(recipe, data=data, model=replace(recipe.model, options=options)), say=print)
    return ExitSegmenter.from_pretrained(out)


def fixed_path(calibration_set: CalibrationSet, bounds: Sequence[float]) -> list[dict[str, Any]]:
    """Methods along a path fixed on images of its own, dense enough around every bound."""
    planner = Planner(calibration_set, DToP(), "classes")
    sequential_test = SequentialTest.on(calibration_set, Bound("max_disagreement", sorted(bounds)[len(bounds) // 2]))
    positions_to_test(planner, sequential_test)  # chooses the path
    end = planner.path.end
    return [spec_of(planner.method_at(end * (i + 1) / POSITIONS)) for i in range(POSITIONS)]


def losses_of_pool(
    notes: Notebook, calibration_set: CalibrationSet, specs: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Disagreement with dense and share of dense compute, `(positions, pool)` each; one run of the network for each
    position."""
    reference = lru_cache(lambda: dense_reference(calibration_set))

    def losses_and_shares(n: int) -> list[list[float]]:
        title = f"position {n} of {len(specs)}"
        run = true_run(calibration_set, build_method(specs[n - 1]), reference(), title)
        return [error(run.confusion, "pixels").tolist(), (run.macs.double() / run.dense_macs).tolist()]

    figures = [notes.once(f"position {n}", partial(losses_and_shares, n)) for n in range(1, len(specs) + 1)]
    losses, shares = np.asarray(figures).swapaxes(0, 1)
    return losses, shares


def draw_calibrations(
    losses: np.ndarray, shares: np.ndarray, bound: float, confidence: float, draws: int, images: int, seed: int
) -> dict[str, Any]:
    """What so many calibrations to "mean disagreement at most `bound`" choose, and how often they are wrong."""
    rng = np.random.default_rng(seed)
    risk = np.concatenate([[0.0], losses.mean(axis=1)])  # behind dense, whose loss is none
    cost = np.concatenate([[1.0], shares.mean(axis=1)])
    chosen = []
    for _ in range(draws):
        picked = losses[:, rng.integers(losses.shape[1], size=images)].mean(axis=1)
        passed = risk_control.hoeffding_bentkus(picked, images, bound) <= 1 - confidence
        chosen.append(risk_control.fixed_sequence(len(passed), passed.__getitem__))
    violations = int((risk[chosen] > bound).sum())
    delta = 1 - confidence
    return {
        "bound": bound,
        "confidence": confidence,
        "draws": draws,
        "images": images,
        "violations": violations,
        "share_of_violations": violations / draws,
        "allowed": delta,
        "allowed_with_noise": delta + 1.645 * math.sqrt(delta * (1 - delta) / draws),
        "true_risk": {"mean": float(risk[chosen].mean()), "largest": float(risk[chosen].max())},
        "share_of_dense": {"mean": float(cost[chosen].mean()), "largest": float(cost[chosen].max())},
        "risks": risk[chosen].tolist(),
    }


def draw_plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """True risk of every calibration beside its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.6 * len(results), 3.4), layout="constrained", sharey=True)
    for ax, result in zip(np.atleast_1d(axes), results):
        bound = result["bound"]
        top = max(1.15 * bound, 1.05 * max(result["risks"]))
        ax.hist(result["risks"], bins=np.linspace(0, top, 36), color="#1f6fb4")
        ax.axvline(bound, color="#c8501e", linewidth=2)
        saved = 1 - result["share_of_dense"]["mean"]
        ax.set_title(
            f"bound {bound:g} at confidence {result['confidence']:g}\n"
            f"violated by {result['share_of_violations']:.1%}, allowed {result['allowed']:.0%}\n"
            f"{saved:.0%} fewer multiply-adds",
            fontsize=9,
        )
        ax.set_xlabel("true disagreement with dense")
        ax.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel(f"calibrations, of {results[0]['draws']}")
    with write_or_refuse(path, "choose another --plot") as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole experiment; returns what each bound came to."""
    out, size = options.out, (options.size, options.size)
    settings = {name: getattr(options, name) for name in ("pool", "path_images", "size", "steps", "bounds")}
    notes = open_notebook(out / "notes.json", settings, "--out")
    model = trained(out / "model", size, options.steps)
    pool = CalibrationSet(
        model, Remembered(Scenes(options.pool, size, POOL_SEED)), tuple(range(options.pool)), progress=bar
    )
    scenes = Remembered(Scenes(options.path_images, size, PATH_SEED))
    aside = CalibrationSet(model, scenes, tuple(range(options.path_images)), progress=bar)
    specs = notes.once("path", partial(fixed_path, aside, options.bounds))
    losses, shares = losses_of_pool(notes, pool, specs)
    results = [
        draw_calibrations(losses, shares, bound, options.confidence, options.draws, options.draws_of, seed=n)
        for n, bound in enumerate(options.bounds)
    ]
    about = {**settings, "method": specs[0]["name"], "risk_along_path": losses.mean(axis=1).tolist()}
    about["share_of_dense_along_path"] = shares.mean(axis=1).tolist()
    with write_or_refuse(options.json or out / "guarantee.json", "choose another --json") as unfinished:
        unfinished.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    if options.plot is not None:
        draw_plot(results, options.plot)
    for result in results:
        print(
            f"bound {result['bound']:g}: {result['violations']} of {result['draws']} draws violate it "
            f"({result['share_of_violations']:.1%}, allowed {result['allowed']:.0%}, with noise "
            f"{result['allowed_with_noise']:.1%}); compute {result['share_of_dense']['mean']:.1%} of dense"
        )
    return results


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/guarantee"), help="folder of model and losses")
    parser.add_argument("--pool", type=int, default=5000, help="scenes whose mean loss is the true risk")
    parser.add_argument("--path-images", type=int, default=200, help="other scenes, on which the path is fixed")
    parser.add_argument("--size", type=int, default=96, help="side of a scene in pixels, a multiple of 8")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--draws", type=int, default=200, help="calibrations for each bound")
    parser.add_argument("--draws-of", type=int, default=600, help="images for each calibration")
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.02, 0.03, 0.05], help="mean disagreements")
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--json", type=Path, help="JSON file of the figures; in --out if not given")
    parser.add_argument("--plot", type=Path, help="PNG of true risks beside their bounds")
    parser.add_argument("--quick", action="store_true", help="short run of about a minute, as a check of the script")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.quick:
        options.pool, options.path_images, options.size, options.steps = 12, 6, 32, 1
        options.draws, options.draws_of, options.bounds = 20, 40, [0.1, 0.3]
    run(options)


if __name__ == "__main__":
    main()
