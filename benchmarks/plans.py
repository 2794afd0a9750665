"""What the planner says of the shipped models, and beside what others have published: the tables of docs/plans.md.

    python -m benchmarks.plans docs/plans.md

Computed, as step_forecast.py is: nothing here was measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import _published as published
from lens_megatron.model_spec import load_model_config, shipped_models
from lens_megatron.planning.gpus import assumed_rates, find_gpu
from lens_megatron.planning.parameters import count_parameters
from lens_megatron.planning.plans import PHASES, Plan
from lens_megatron.planning.search import ALIKE, search
from lens_megatron.planning.work import ASSUMED_RESCUED, Workload

GPU = "h100"
COUNTS = tuple(2**k for k in range(11))
WORK = Workload(rescued=ASSUMED_RESCUED, scores_prompts=True)
GIB = 1024**3


def documented_models() -> list[str]:
    names = [name for name in shipped_models() if not name.startswith("tiny-")]
    return sorted(names, key=lambda name: count_parameters(load_model_config(name).spec))


def plan_row(model: str, gpus: int) -> str:
    gpu = find_gpu(GPU)
    found = search(load_model_config(model).spec, gpu, assumed_rates(gpu), WORK, gpus, most=1)
    if not found.best:
        why = found.nearest.complaint.partition(";")[0] if found.nearest else "an engine does not fit"
        return f"| {model} | {gpus} | does not fit: {why} |" + " |" * 10
    return _row(model, found.best[0])


def _row(model: str, plan: Plan) -> str:
    setup, layout = plan.setup, plan.setup.layout
    where = setup.placement if setup.placement != "disaggregated" else f"{setup.trainer_gpus} + {setup.engine_gpus}"
    cells = [
        model,
        setup.gpus,
        where,
        f"{layout.tp} / {layout.pp} / {layout.cp} / {layout.ep} / {setup.dp}",
        setup.recompute,
        setup.engine_tp,
        f"{plan.trainer.peak / GIB:.1f}",
        *(f"{plan.seconds[phase]:.1f}" for phase in ("generate", "logprobs", "train", "sync")),
        f"{plan.step_seconds:.0f}",
        plan.limits_time,
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table_5_rows() -> list[str]:
    rows = []
    for model, figures in published.TABLE_5.items():
        for algorithm, seconds in figures.items():
            predictions = [published.predicted_step(model, algorithm, tokens) for tokens in published.RESPONSES]
            cells = [f"{value:.0f} s ({value / seconds - 1:+.0%})" for value in predictions]
            rows.append(f"| {model} | {algorithm} | {seconds:.0f} s | " + " | ".join(cells) + " |")
    return rows


def relative_cost_rows() -> list[str]:
    rows = []
    for model, figures in published.TABLE_5.items():
        for algorithm in ("grpo_extended", "lens"):
            ratios = [
                published.predicted_step(model, algorithm, tokens) / published.predicted_step(model, "grpo", tokens)
                for tokens in published.RESPONSES
            ]
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            rows.append(f"| {model} | {algorithm} | {figures[algorithm] / figures['grpo']:.2f} | {cells} |")
    return rows


def sync_rows() -> list[str]:
    rows = []
    for one in published.SYNCS:
        seconds = published.predicted_sync(one)
        low, high = seconds / one.most - 1, seconds / one.least - 1
        rows.append(f"| {one.model} | {one.least:g}-{one.most:g} s | {seconds:.1f} s | {low:+.0%} to {high:+.0%} |")
    return rows


_PAGE = """\
# Plans of the shipped models

Written by `python -m benchmarks.plans docs/plans.md`; a test compares it with the code. **Everything here
is computed, nothing measured**: formulas and assumptions are in [planning.md](planning.md). Rates are assumed shares of data
sheets.

## LENS, 128 prompts x 8, responses of 1,024 tokens on average and 4,096 at most, on {gpu}

The simplest layout of those that fit and are within {alike:.0%} of the fastest, {rescued:.0%} of the prompts rescued,
`speculative`. `colocated`: engine and trainer take turns on all GPUs; `a + b`: trainer + engine.
Layout: tp / pp / cp / ep / dp. Peak: GiB of the fullest trainer GPU. Columns of seconds leave
out scoring and what is 0; phases are {phases}. The work is the same in all
rows: from some number of GPUs on, more of them only wait for the longest response.

| model | GPUs | placement | layout | recompute | engine tp | peak | generate | logprobs | train | sync | step | limited by |
|---|---:|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|
{plans}

## Beside published figures

arXiv 2601.21244, Table 5: 8 x A800 with verl, 128 prompts, at most 4,096 tokens. It does not print response lengths, so
three guesses of the mean; in brackets the prediction's error. Our plan is of this project's layouts and kernels, not of
verl's, and its rates are what good kernels reach: it is too fast nearly everywhere.

| model | algorithm | published | mean 512 | mean 1,024 | mean 2,048 |
|---|---|---:|---:|---:|---:|
{steps}

The same as multiples of GRPO's step, which says less about kernels and more about the work:

| model | algorithm | published | mean 512 | mean 1,024 | mean 2,048 |
|---|---|---:|---:|---:|---:|
{ratios}

Whole weight syncs, as others report them for several systems, transports and machines at once (number of nodes assumed):

| model | published | predicted | error |
|---|---:|---:|---|
{syncs}
"""


def page() -> str:
    return _PAGE.format(
        gpu=GPU.upper(),
        rescued=ASSUMED_RESCUED,
        alike=ALIKE,
        phases=", ".join(PHASES),
        plans="\n".join(plan_row(model, gpus) for model in documented_models() for gpus in COUNTS),
        steps="\n".join(table_5_rows()),
        ratios="\n".join(relative_cost_rows()),
        syncs="\n".join(sync_rows()),
    )


if __name__ == "__main__":
    text = page()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        print(text)
