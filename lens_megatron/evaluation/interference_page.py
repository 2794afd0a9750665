"""The page and the table of `analyze interference`: Figures 2b and 2c."""

from __future__ import annotations

from collections.abc import Sequence

from lens_megatron import __version__
from lens_megatron.evaluation.interference import Condition, Interference, InterferenceConfig
from lens_megatron.reporting import figures
from lens_megatron.reporting.charts import Bars, Series, bar_chart, nothing, step_chart
from lens_megatron.reporting.document import html_document
from lens_megatron.reporting.panels import figure, legend, table

HEAD = (
    "strategy",
    "gamma",
    "prompts",
    "deleted",
    "before",
    "resampled",
    "after",
    "gain",
    "interval",
    "improved",
    "control",
)


def rows(found: Interference) -> list[list[str]]:
    """One line a strategy and gamma; percent, but for the number of prompts and of tokens deleted."""
    lines = []
    for one in found.conditions:
        between = "–"
        if one.gain_interval is not None:
            between = f"{100 * one.gain_interval.low:+.1f} to {100 * one.gain_interval.high:+.1f}"
        lines.append(
            [
                one.strategy,
                f"{100 * one.gamma:g}%",
                str(one.prompts),
                "–" if one.deleted is None else f"{one.deleted:.1f}",
                *(_percent(value) for value in (one.before, one.resampled, one.after)),
                "–" if one.gain is None else f"{100 * one.gain:+.1f}",
                between,
                *(_percent(value) for value in (one.improved, one.improved_by_resampling)),
            ]
        )
    return lines


def interference_page(found: Interference, model: str, reference: str, config: InterferenceConfig) -> str:
    plots = [score_figure(found), *outcome_figures(found, config)]
    about = (
        "Percent. before: the draw that the failed prompts were chosen by. resampled: a second draw of the same prompts, "
        "nothing deleted; a prompt that was chosen for failing does better then by chance alone. gain: after - resampled, "
        f"with its {100 * config.level:g}% interval over prompts. improved: share of prompts with more successes than before; "
        "control: the same of the second draw."
    )
    numbers = (
        f"{found.prompts} prompts, {found.failed} failed (success rate below {config.failed_below:g} in the first draw of "
        f"{config.samples}). Success of all: {_percent(found.success)}%; of the failed: {_percent(found.before)}%, and "
        f"{_percent(found.resampled)}% in the second draw. Noise floor of scores: {found.noise_floor:.3g}."
    )
    sections = [
        ("figures", "Figures 2b and 2c", f'<div class="figures">{"".join(plots)}</div>'),
        ("numbers", "Numbers", f"<p>{numbers}</p>{table(HEAD, rows(found))}<p class='soft'>{about}</p>"),
    ]
    return html_document(
        f"{model}: interference tokens",
        "Interference tokens",
        f"Policy {model}, reference {reference}. By lens-megatron {__version__}, {{made}}.",
        sections,
        ("interference", {}),
        "Figure numbers are those of arXiv 2601.21244.",
    )


def score_figure(found: Interference) -> str:
    title = "Figure 2b: interference scores of prompt tokens"
    both = [
        (label, histogram)
        for label, scores in (("all tokens", found.scores), ("deleted by interference", found.deleted_scores))
        if (histogram := figures.score_histogram(scores)) is not None
    ]
    start, edges = figures.bin_range([histogram for _, histogram in both])
    if not edges:
        return figure(title, nothing("Every score is 0: the two models are the same."))
    series = [
        Series(label, [(place - start, share) for place, share in histogram.shares.items()], number, dashed=number > 0)
        for number, (label, histogram) in enumerate(both)
    ]
    note = (
        f"|log π − log π_ref| of {both[0][1].tokens:,} tokens, both axes logarithmic; exactly 0: {both[0][1].zero_share:.1%}. "
        "Deleted: with the largest gamma."
    )
    key = legend([(label, f"var(--s{number})", "line") for number, (label, _) in enumerate(both)])
    return figure(title, step_chart(series, edges, "score (nats)", "share of tokens"), note, key)


def outcome_figures(found: Interference, config: InterferenceConfig) -> list[str]:
    titles = (f"Figure 2c: Average@{config.samples} of failed prompts", "Figure 2c: share of failed prompts improved")
    if not any(one.prompts for one in found.conditions):
        return [
            figure(title, nothing("No prompt failed, or nothing was deleted from those that did.")) for title in titles
        ]
    gammas = sorted({one.gamma for one in found.conditions})
    by_strategy = {
        one.strategy: [c for c in found.conditions if c.strategy == one.strategy] for one in found.conditions
    }
    categories = [f"{100 * gamma:g}%" for gamma in gammas]

    def bars(name: str, control: str) -> list[Bars]:
        chosen = [
            Bars("resampled (control)", _values(next(iter(by_strategy.values())), control, gammas), "var(--line)")
        ]
        for number, (strategy, conditions) in enumerate(by_strategy.items()):
            chosen.append(Bars(strategy, _values(conditions, name, gammas), f"var(--s{number})"))
        return chosen

    outcomes = bars("after", "resampled")
    outcomes.insert(0, Bars("before", [found.before] * len(gammas), "var(--soft)"))
    improved = bars("improved", "improved_by_resampling")
    notes = (
        "By gamma. Before: the draw that chose them; too low for that reason. Resampled: the same prompts drawn again. What "
        "deletion does is the difference to that.",
        "By gamma. More successes than in the first draw; the control is a second draw with nothing deleted.",
    )
    return [
        figure(title, bar_chart(categories, some, unit), note, legend([(b.label, b.css, "block") for b in some]))
        for title, some, unit, note in zip(
            titles, (outcomes, improved), ("share of responses correct", "share of prompts"), notes, strict=True
        )
    ]


def _values(conditions: Sequence[Condition], name: str, gammas: Sequence[float]) -> list[float | None]:
    by_gamma = {one.gamma: getattr(one, name) for one in conditions}
    return [by_gamma.get(gamma) for gamma in gammas]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
