"""`lens-megatron report`: one HTML page from run folders."""

from __future__ import annotations

from collections.abc import Sequence

from lens_megatron import __version__
from lens_megatron.reporting import figures, panels
from lens_megatron.reporting.browser import browser_data
from lens_megatron.reporting.document import html_document
from lens_megatron.reporting.panels import curves
from lens_megatron.reporting.runs import Run

_NO_RESCUE = "prompts were not purified"


def report_page(runs: Sequence[Run]) -> str:
    names = ", ".join(run.name for run in runs)
    sections = [
        ("summary", "Summary", _summary(runs)),
        ("learning", "Learning", _grid(learning(runs))),
        ("purification", "Prompts and purification", _grid(purification(runs))),
        ("update", "The update", _grid(update(runs))),
        ("time", "Time", _grid(time(runs))),
        ("browse", "Rollouts", _browser()),
    ]
    return html_document(
        f"{names}: training report",
        names,
        f"Training report by lens-megatron {__version__}, {{made}}. Every number comes from the runs' own files.",
        sections,
        ("rollouts", browser_data(runs)),
        "Lines of more than 30 steps: faint as measured, strong as the mean of the last twentieth of the steps. Figure and "
        "table numbers are those of arXiv 2601.21244.",
        panels.legend(panels.run_legend(runs)),
    )


def learning(runs: Sequence[Run]) -> list[str]:
    return [
        curves(
            runs,
            "Figure 4: success",
            [("success", "")],
            "share of rollouts correct",
            "On the training prompts of each step.",
        ),
        *panels.evaluation_figures(runs),
        curves(runs, "Figure 8: reward", [("reward", "")], "mean reward", "Rollouts of the original prompts."),
        curves(runs, "Figure 8: entropy", [("entropy", "")], "nats a token"),
        curves(runs, "Figure 8: response length", [("response_tokens", "")], "tokens a response"),
        curves(
            runs,
            "Figure 2a: zero-reward prompts",
            [("zero_reward_ratio", "")],
            "share of prompts",
            "Prompts none of whose rollouts (under the original prompt) is correct.",
        ),
        panels.zero_reward_bars(runs),
    ]


def purification(runs: Sequence[Run]) -> list[str]:
    return [
        panels.distribution_figure(runs),
        panels.score_figure(runs),
        curves(
            runs,
            "Purified and improved prompts",
            [("purified_ratio", "purified, of all prompts"), ("improved_ratio", "improved, of the purified")],
            "share",
            "Improved: more successes under the purified prompt than under the original.",
            _NO_RESCUE,
            source=_if_purified,
        ),
        curves(
            runs,
            "Deleted tokens",
            [("deleted_tokens", "")],
            "tokens a step",
            "Of all prompts that were rolled out again.",
            _NO_RESCUE,
            source=_if_purified,
        ),
        curves(
            runs,
            "Groups without signal",
            [("zero_signal_ratio", "")],
            "share of groups that train",
            "All rewards of the group are equal: nothing to learn from.",
        ),
        curves(
            runs,
            "Success, before and after replacement",
            [("success", "Y: original rollouts"), ("success_trained", "G: the group that trains")],
            "share of rollouts correct",
        ),
        curves(
            runs,
            "Zero-reward prompts, before and after replacement",
            [("zero_reward_ratio", "Y: original rollouts"), ("zero_reward_ratio_trained", "G: the group that trains")],
            "share of prompts",
        ),
    ]


def update(runs: Sequence[Run]) -> list[str]:
    return [
        curves(
            runs,
            "Importance ratio",
            [("ratio_original", "original rollouts"), ("ratio_purified", "purified rollouts")],
            "π(y|x) / π_old(y|x_roll)",
            "Purified rollouts far below 1: they teach little.",
        ),
        curves(
            runs,
            "Clip fraction",
            [("clip_fraction", "all rollouts"), ("clip_fraction_purified", "purified rollouts")],
            "share of tokens",
        ),
        curves(
            runs,
            "KL to the reference",
            [("kl", "all rollouts"), ("kl_purified", "purified rollouts")],
            "nats a token",
            missing="no KL term in the loss",
        ),
        curves(
            runs,
            "Trainer and engine",
            [("logprob_diff", "")],
            "mean |Δ log-prob| a token",
            "The same weights and tokens in both: what differs is arithmetic, or a bug.",
        ),
        curves(runs, "Loss", [("loss", "")], "loss"),
        curves(runs, "Gradient norm", [("grad_norm", "")], "norm before clipping"),
    ]


def time(runs: Sequence[Run]) -> list[str]:
    return [
        panels.speedup_figure(runs),
        panels.step_time_table(runs),
        panels.step_time_figure(runs),
        curves(
            runs, "Time of each step", [("time/step", "")], "seconds", source=lambda run, _: figures.step_seconds(run)
        ),
        curves(runs, "Throughput", [("tokens", "")], "tokens/s", source=lambda run, _: figures.tokens_a_second(run)),
        success_over_time(runs),
    ]


def success_over_time(runs: Sequence[Run]) -> str:
    longest = max(figures.seconds_until(run, float("inf")) or 0.0 for run in runs)
    unit, seconds = ("hours", 3600.0) if longest >= 7200 else ("minutes", 60.0) if longest >= 120 else ("seconds", 1.0)
    return curves(
        runs,
        "Success over time",
        [("success", "")],
        "share of rollouts correct",
        "What a step costs is part of the comparison.",
        source=lambda run, metric: figures.over_time(run, metric, seconds),
        x_label=f"{unit} of training",
    )


def _if_purified(run: Run, metric: str) -> list[tuple[float, float]]:
    """Ratios of 0 at every step say that the run does not purify, not that it purified badly."""
    return run.points(metric) if any(run.values("purified_ratio")) else []


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'


def _summary(runs: Sequence[Run]) -> str:
    configurations = panels.differences(runs) + panels.changes_on_the_way(runs)
    return panels.key_numbers(runs) + _about_numbers() + configurations


def _about_numbers() -> str:
    return '<p class="soft">a → b: means of the first and of the last tenth of the steps. A step: mean without the first.</p>'


def _browser() -> str:
    return """<div class="browser" id="browser">
<p class="soft">The first, middle and last saved step of each run. Prompts that were rescued come first, then those purified
in vain, those with successes and failures, all failed, all solved.</p>
<div class="choose"><label>run<select name="run"></select></label><label>step<select name="step"></select></label>
<label>prompt (successes of originals → of purified)<select name="prompt"></select></label></div>
<p class="soft"><span class="count"></span>
<span class="heatscale">interference score: 0 <i></i> the prompt's highest; deleted tokens are <del>struck out</del></span></p>
<div class="shown"></div></div>"""
