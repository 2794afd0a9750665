"""Figures and tables of docs/study.md, from the committed tables in examples/study/data.

python -m examples.study.report        (from the repository's root)

Text between `<!-- study:NAME -->` and `<!-- /study -->` in the page is replaced by the table of that name.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.study import beside, beside_programs, paper_tables, tables
from examples.study.analysis import PRIMARY, Runs, band, load_runs
from examples.study.collect import DATA
from examples.study.drawing import Line, figure

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "study.md"
IMAGES = ROOT / "docs" / "img" / "study"
MARKED = re.compile(r"(<!-- study:([\w-]+) -->\n).*?(<!-- /study -->)", re.DOTALL)
DELETING = ("lens", "lens_plus", "random", "gradient")
# an arm has the same colour in every figure that the main arms share; grey is chance
PLACES = {
    arm: place
    for place, arm in enumerate(
        (
            *tables.MAIN,
            "gradient",
            "chance",
            "oracle",
            "no_importance",
            "lens_strict",
            "oracle_plus",
            "oracle_keep",
        )
    )
}
BASELINES = ("grpo", "grpo_extended", "dapo", "greso", "archer", "forking", "lens_dapo", "lens_greso")
ENOUGH = 3  # seeds; the interval of two says nothing, and hides the others
# of the list programs, which no other figure shows
PLACES |= {"gamma_1": 6, "gamma_1_no_ratio": 5, "oracle_no_ratio": 3}


def over_steps(
    runs: Runs, metric: str, title: str, arms: Sequence[str], window: int = 1, from_zero: bool = True
) -> str:
    lines = []
    for arm in arms:
        points = band(runs[arm], metric, window)
        if len(runs[arm]) < ENOUGH:
            points = [(step, middle, middle, middle) for step, middle, *_ in points]
        lines.append(Line(f"{arm} ({len(runs[arm])})", points, PLACES.get(arm)))
    return figure(lines, title, "gradient step (seeds in brackets)", from_zero)


def figures(runs: Runs) -> dict[str, str]:
    """By file name. Bands: 95% intervals of the mean over seeds, where there are three or more."""
    main = [arm for arm in tables.MAIN if arm in runs]
    deleting = [arm for arm in DELETING if arm in runs]
    precision = [Line(arm, band(runs[arm], "purification/planted_precision", 9), PLACES[arm]) for arm in deleting]
    if "lens" in runs:
        precision.append(Line("chance", band(runs["lens"], "purification/planted_chance", 9), PLACES["chance"]))
    ratios = [arm for arm in (*tables.MAIN, "oracle", "no_importance") if arm in runs]
    rescuing = [arm for arm in ratios if any(run.values("rho_purified_below_0.3") for run in runs[arm].values())]
    drawn = {
        "noisy": over_steps(runs, PRIMARY, "Held out, two words of noise: success", main),
        "oracle": over_steps(
            runs,
            PRIMARY,
            "Held-out noisy success, with exactly the noise deleted",
            [arm for arm in ("grpo", "lens", "oracle", "oracle_keep", "oracle_plus") if arm in runs],
        ),
        "unseen": over_steps(runs, "eval/unseen", "Held out, a kind of noise that training never saw: success", main),
        "clean": over_steps(runs, "eval/clean", "Held out, without noise: success", main, from_zero=False),
        "zero_reward": over_steps(
            runs, "zero_reward_ratio", "Prompts whose rollouts Y all fail (mean of 9 steps)", main, 9
        ),
        "success": over_steps(runs, "success", "Success of Y in training (mean of 9 steps)", main, 9),
        "precision": figure(precision, "Deleted tokens that are planted noise (mean of 9 steps)", "gradient step"),
        "ratio": over_steps(
            runs, "rho_purified_below_0.3", "Tokens of P with ratio below 0.3 (mean of 9 steps)", rescuing, 9
        ),
        "others": over_steps(
            runs, PRIMARY, "Held-out noisy success, other baselines (mean of 3)", [a for a in BASELINES if a in runs], 3
        ),
        "tokens": figure(
            [Line(f"{arm} ({len(runs[arm])})", tables.against_tokens(runs[arm]), PLACES[arm]) for arm in main],
            "Held-out noisy success against sampled tokens",
            "thousand tokens, prompts' rescues included (mean over seeds)",
        ),
    }
    return {f"{name}.svg": text for name, text in drawn.items()}


def figures_beside(data: Path) -> dict[str, str]:
    graded, control, programs = (load_runs(data / beside.FOLDER, name) for name in ("graded", "control", "programs"))
    drawn = {
        "programs": over_steps(
            programs,
            beside_programs.DECOY,
            "List programs with a strong decoy: held-out success",
            [arm for arm in beside_programs.DRAWN if arm in programs],
        ),
        "graded": over_steps(
            graded,
            beside.CREDIT,
            "Partial credit: held-out share of right counts",
            [arm for arm in beside.GRADED_ARMS if arm in graded],
        ),
        "control": over_steps(
            control,
            beside.BARE,
            "Control without noise: held-out success",
            [arm for arm in beside.CONTROL_ARMS if arm in control],
        ),
    }
    return {f"{name}.svg": text for name, text in drawn.items()}


def fill(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """The page with its marked blocks made anew; a mark that nothing fills is a mistake."""

    def made(found: re.Match[str]) -> str:
        return f"{found.group(1)}\n{blocks[found.group(2)]().strip()}\n\n{found.group(3)}"

    return MARKED.sub(made, page)


def report(data: Path, page: Path, images: Path) -> None:
    runs, pilot = load_runs(data), load_runs(data, "pilot")
    images.mkdir(parents=True, exist_ok=True)
    for name, text in {**figures(runs), **figures_beside(data)}.items():
        (images / name).write_text(text, encoding="utf-8")
    blocks = {**tables.blocks(runs, pilot, data), **paper_tables.blocks(runs, data), **beside.blocks(data, pilot)}
    blocks |= beside_programs.blocks(data)
    filled = fill(page.read_text(encoding="utf-8"), blocks)
    page.write_text(filled, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--page", type=Path, default=PAGE, help="filled in place")
    parser.add_argument("--images", type=Path, default=IMAGES)
    given = parser.parse_args()
    report(given.data, given.page, given.images)
    print(f"{given.page}, {given.images}")


if __name__ == "__main__":
    main()
