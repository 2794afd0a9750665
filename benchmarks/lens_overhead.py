"""What LENS costs over GRPO: step time side by side, for the three schedules of the rescue rollouts.

    python -m benchmarks.lens_overhead embedded --model HF_FOLDER --data train.jsonl --json RESULT.json
    python -m benchmarks.lens_overhead simulated --json RESULT.json

embedded    the real trainer, host, driver, sampler and the embedded engine. One policy; the algorithms take turns on it
            step by step, each with the same prompts in a round, each with its own sampling history. What is reported are
            ratios within a round, their medians over the rounds; of wall time, and of CPU time, which other work on the
            machine stretches less.
simulated   generation in virtual time on 8 engines (_simulated_engine.py), swept over what is assumed. No model runs.
            Samples are rebuilt and counted by the real code; the rest of a step is taken to cost what its tokens cost,
            and generation to have a stated share of GRPO's step.

The paper reports 1.27-1.56x for LENS and 1.48-1.79x for GRPO with twice the rollouts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import psutil

from benchmarks._machine import machine
from benchmarks._simulated_engine import SimulatedEngine, Simulation, SimulationConfig
from lens_megatron.algorithms.rescue import RescueConfig, rebuild_group
from lens_megatron.rollout.factory import rescue_rules
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import NO_RESCUE, SampleResult, SamplingConfig, Schedule
from lens_megatron.types import PurifiedPrompt

TARGET = 1.15
PAPER = {"lens": (1.27, 1.56), "grpo_extended": (1.48, 1.79)}
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class Variant:
    name: str
    algorithm: str
    schedule: Schedule = "speculative"


VARIANTS = (
    Variant("grpo", "grpo"),
    Variant("grpo_extended", "grpo_extended"),
    *(Variant(f"lens {schedule}", "lens", schedule) for schedule in SCHEDULES),
)


# Simulated.

PROMPT_TOKENS = 256
GENERATION_SHARES = (0.5, 0.7, 0.85)  # of GRPO's step


@dataclass
class Simulated:
    """Against GRPO on the same prompts with the same seeds."""

    generation: float  # ratio of generation times
    rest: float  # ratio of the tokens of everything else
    wasted_share: float  # of the tokens generated
    purified_ratio: float  # of the prompts


def simulate(config: SimulationConfig, prompts: int, n: int, variant: Variant, steps: int) -> list[SampleResult]:
    """`steps` visits to the same prompts: from the second on, history tells which will fail."""
    simulation = Simulation(config, PROMPT_TOKENS)
    xs, purified_tokens = simulation.prompts(prompts)
    rescue = RescueConfig(mode="purification")
    lens = variant.algorithm == "lens"
    count = 2 * n if variant.algorithm == "grpo_extended" else n
    sampling = SamplingConfig(n=count, max_response_tokens=4096, schedule=variant.schedule)
    rules = rescue_rules(rescue) if lens else NO_RESCUE
    sampler = Sampler(SimulatedEngine(simulation), simulation.reward, rules, sampling, (), config.seed)
    primes = [
        PurifiedPrompt(x.id, tokens, (PROMPT_TOKENS - 1,)) if lens else None
        for x, tokens in zip(xs, purified_tokens, strict=True)
    ]
    return [sampler.sample(xs, primes, step) for step in range(steps)]


def training_cost(result: SampleResult, lens: bool) -> float:
    """Token passes outside generation: pi_old, reference, and an update worth three; prompts are scored twice by LENS."""
    rescue = RescueConfig(mode="purification" if lens else "none")
    groups = [rebuild_group(group, rescue, seed=0, step=0) for group in result.groups]
    tokens = sum(PROMPT_TOKENS + len(m.rollout.response) for group in groups for m in group.members)
    return 5.0 * tokens + (2.0 * PROMPT_TOKENS * len(groups) if lens else 0.0)


def compare_simulated(config: SimulationConfig, prompts: int, n: int, seeds: int) -> dict[str, Simulated]:
    """Of the second visit, by variant; "lens speculative, first visit" without history. Means over the seeds."""
    found: dict[str, list[Simulated]] = {}
    for seed in range(seeds):
        of_seed = replace(config, seed=seed)
        results = {variant: simulate(of_seed, prompts, n, variant, 2) for variant in VARIANTS}
        base = results[VARIANTS[0]]
        for variant, visits in results.items():
            for visit in (0, 1):
                if visit == 0 and variant.name != "lens speculative":
                    continue
                name = variant.name + (", first visit" if visit == 0 else "")
                result, grpo, lens = visits[visit], base[visit], variant.algorithm == "lens"
                counts = result.counts
                all_tokens = counts.original_tokens + counts.purified_tokens + counts.wasted_tokens
                found.setdefault(name, []).append(
                    Simulated(
                        generation=counts.seconds / grpo.counts.seconds,
                        rest=training_cost(result, lens) / training_cost(grpo, False),
                        wasted_share=counts.wasted_tokens / all_tokens,
                        purified_ratio=statistics.mean(bool(group.purified) for group in result.groups),
                    )
                )
    return {
        name: Simulated(*(statistics.mean(getattr(one, key) for one in many) for key in asdict(many[0])))
        for name, many in found.items()
    }


def step_ratio(one: Simulated, share: float) -> float:
    return share * one.generation + (1 - share) * one.rest


SWEEP: dict[str, dict[str, Any]] = {
    "as in the design": {},
    "128 slots a server": {"slots_per_server": 128},
    "saturates at 100 rows": {"saturation_rows": 100.0},
    "saturates at 400 rows": {"saturation_rows": 400.0},
    "compute-bound (saturates at 5 rows)": {"saturation_rows": 5.0},
    "fewer failures (success up to 1.0, Beta 2)": {"success_scale": 1.0, "success_shape": 2.0},
    "more failures (success up to 0.6)": {"success_scale": 0.6},
    "narrow lengths (spread 0.3)": {"log_length_spread": 0.3},
    "four times the prompts": {"times_prompts": 4},
}


def run_simulated(names: Sequence[str], prompts: int, n: int, seeds: int) -> dict[str, dict[str, Simulated]]:
    rows = {}
    for name in names:
        values = dict(SWEEP[name])
        count = prompts * int(values.pop("times_prompts", 1))
        rows[name] = compare_simulated(SimulationConfig(**values), count, n, seeds)
    return rows


def simulated_table(rows: Mapping[str, Mapping[str, Simulated]]) -> str:
    shown = [*(v.name for v in VARIANTS[1:]), "lens speculative, first visit"]
    lines = [
        "| SIMULATED, generation time against grpo | purified | " + " | ".join(shown) + " | tokens wasted |",
        "|---|---:|" + "---:|" * (len(shown) + 1),
    ]
    for name, row in rows.items():
        cells = [f"{row[v].generation:.2f}" for v in shown]
        best = row["lens speculative"]
        lines.append(f"| {name} | {best.purified_ratio:.0%} | " + " | ".join(cells) + f" | {best.wasted_share:.0%} |")
    first = rows[next(iter(rows))]
    lines += ["", "| SIMULATED, whole step against grpo | " + " | ".join(shown) + " |", "|---|" + "---:|" * len(shown)]
    for share in GENERATION_SHARES:
        cells = [f"{step_ratio(first[v], share):.2f}" for v in shown]
        lines.append(f"| generation {share:.0%} of grpo's step | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Embedded.


@dataclass(frozen=True)
class Turn:
    """One step of one variant."""

    variant: str
    seconds: float
    # trainer and driver take turns, so that the sum is what an idle machine would take
    engine_cpu: float
    trainer_cpu: float
    phases: dict[str, float]  # wall seconds
    tokens: float  # generated, wasted ones included
    wasted_tokens: float
    purified_ratio: float


class SideBySide:
    """One trainer whose configuration changes with each step; what an algorithm remembers changes with it."""

    def __init__(self, trainer: Any, configs: Mapping[str, Any]) -> None:
        self.trainer, self.host, self.configs = trainer, trainer.host, configs
        self.driver, self.step = self.host.driver, 0
        self.engine_process = psutil.Process(self.driver.pid)
        self.sampling: SamplingConfig | None = None
        sample = self.driver.sample
        self.driver.sample = lambda prompts, purified, step: sample(prompts, purified, step, self.sampling)
        self.memories: dict[str, Any] = {}
        trainer.sync_weights(version=0)

    def warm_up(self, name: str, steps: int) -> None:
        for _ in range(steps):
            self.take_turn(name)
        self.memories = dict.fromkeys(self.configs, self.memories[name])

    def cpu(self) -> tuple[float, float]:
        times = self.engine_process.cpu_times()
        return times.user + times.system, time.process_time()

    def take_turn(self, name: str) -> Turn:
        """One step as loop.train makes it."""
        trainer, host = self.trainer, self.host
        trainer.config = host.config = config = self.configs[name]
        if name in self.memories:
            stream, sampler = self.memories[name]
            host.stream.load_state_dict(stream)
            self.driver.load_state_dict(sampler)
        self.sampling = SamplingConfig(**{f.name: getattr(config.rollout, f.name) for f in fields(SamplingConfig)})
        (engine, own), wall = self.cpu(), time.perf_counter()
        trainer.begin_step(self.step)
        while prompts := trainer.next_prompts():
            with trainer.phase("score"):
                signals = trainer.score_prompts(prompts)
            with trainer.phase("generate"):
                trainer.roll_out(prompts, signals)
        groups = trainer.training_groups()
        with trainer.phase("logprobs"):
            evaluated = trainer.evaluate(groups)
        with trainer.phase("train"):
            metrics = trainer.update(evaluated)
        with trainer.phase("sync"):
            trainer.sync_weights(version=self.step + 1)
        trainer.finish_step(evaluated, metrics)
        wall, (engine_after, own_after) = time.perf_counter() - wall, self.cpu()
        self.step += 1
        self.memories[name] = (host.stream.state_dict(), self.driver.state_dict())
        tree = host.folder.read_metrics()[-1]
        phases = {phase: tree[f"time/{phase}"] for phase in ("score", "generate", "logprobs", "train", "sync")}
        wasted = tree["sampling/wasted_tokens"]
        return Turn(
            variant=name,
            seconds=wall,
            engine_cpu=engine_after - engine,
            trainer_cpu=own_after - own,
            phases=phases,
            tokens=tree["tokens"] + wasted,
            wasted_tokens=wasted,
            purified_ratio=tree["purified_ratio"],
        )


def run_embedded(
    model: Path, data: Path, folder: Path, *, rounds: int, warm_up: int, prompts: int, n: int, slots: int, tau: float
) -> list[dict[str, Turn]]:
    """Rounds of one turn each, in an order that rotates."""
    from lens_megatron.config import load_run
    from lens_megatron.model_spec import load_model_config
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.trainer import Trainer

    tree = {
        "model": str(model),
        "run_dir": str(folder / "run"),
        "data": {"train": str(data), "prompts_per_step": prompts},
        "rewards": {"default": {"kind": "numeric"}, "workers": 1},
        "optimizer": {"lr": 1.0e-4},
        "update": {"tokens_per_microbatch": 8192},
        "steps": warm_up + rounds * len(VARIANTS),
    }
    configs = {}
    for variant in VARIANTS:
        count = 2 * n if variant.algorithm == "grpo_extended" else n
        rollout = {"n": count, "max_response_tokens": 96, "slots": slots, "schedule": variant.schedule}
        algorithm: dict[str, Any] = {"preset": variant.algorithm}
        if variant.algorithm == "lens":
            algorithm["rescue"] = {"tau": tau}
        path = folder / f"{variant.name.replace(' ', '_')}.yaml"
        path.write_text(json.dumps({**tree, "algorithm": algorithm, "rollout": rollout}))
        configs[variant.name] = load_run(path, [])
    lens = configs[VARIANTS[-1].name]  # its rescue rules serve all: without purified prompts there is nothing to rescue
    trainer = Trainer(lens, load_model_config(lens.model), RunFolder.create(lens.run_dir))
    try:
        side_by_side = SideBySide(trainer, configs)
        side_by_side.warm_up("grpo", warm_up)
        names = list(configs)
        return [
            {name: side_by_side.take_turn(name) for name in names[i % len(names) :] + names[: i % len(names)]}
            for i in range(rounds)
        ]
    finally:
        trainer.close()


@dataclass(frozen=True)
class Embedded:
    """Medians over the rounds of the ratio to GRPO's step in the same round."""

    step: float
    step_cpu: float
    engine_cpu: float
    trainer_cpu: float
    tokens: float
    wasted_share: float
    purified_ratio: float
    seconds: float
    engine_share: float  # of this variant's own CPU time


def summary(rounds: Sequence[Mapping[str, Turn]]) -> dict[str, Embedded]:
    def cpu(turn: Turn) -> float:
        return turn.engine_cpu + turn.trainer_cpu

    result = {}
    for name in rounds[0]:
        pairs = [(turns[name], turns["grpo"]) for turns in rounds]
        result[name] = Embedded(
            step=statistics.median(a.seconds / b.seconds for a, b in pairs),
            step_cpu=statistics.median(cpu(a) / cpu(b) for a, b in pairs),
            engine_cpu=statistics.median(a.engine_cpu / b.engine_cpu for a, b in pairs),
            trainer_cpu=statistics.median(a.trainer_cpu / b.trainer_cpu for a, b in pairs),
            tokens=statistics.median(a.tokens / b.tokens for a, b in pairs),
            wasted_share=statistics.median(a.wasted_tokens / a.tokens for a, _ in pairs),
            purified_ratio=statistics.mean(a.purified_ratio for a, _ in pairs),
            seconds=statistics.median(a.seconds for a, _ in pairs),
            engine_share=statistics.median(a.engine_cpu / cpu(a) for a, _ in pairs),
        )
    return result


def embedded_table(found: Mapping[str, Embedded]) -> str:
    lines = [
        "| EMBEDDED, against grpo in the same round | step | step, CPU | engine, CPU | trainer, CPU |"
        " tokens | wasted | purified | paper's step |",
        "|---|" + "---:|" * 8,
    ]
    for name, one in found.items():
        paper = PAPER.get(name.split()[0])
        cells = [one.step, one.step_cpu, one.engine_cpu, one.trainer_cpu, one.tokens]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{value:.2f}" for value in cells)
            + f" | {one.wasted_share:.0%} | {one.purified_ratio:.0%} | {'{}-{}'.format(*paper) if paper else ''} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("embedded", "simulated"))
    parser.add_argument("--model", type=Path, help="embedded: an HF folder that solves some prompts of --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=8, help="embedded: GRPO steps first, or nothing can be scored")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, help="default: 16 embedded, 128 simulated")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2, help="simulated")
    parser.add_argument("--json", type=Path, help="a Markdown table is written beside it")
    args = parser.parse_args()
    tree: dict[str, Any] = {**machine(), "kind": args.kind, "target": TARGET, "paper": PAPER}
    if args.kind == "simulated":
        rows = run_simulated(list(SWEEP), args.prompts or 128, args.n, args.seeds)
        text = simulated_table(rows)
        tree |= {"model": asdict(SimulationConfig()), "sweep": SWEEP, "seeds": args.seeds, "n": args.n}
        tree["results"] = {name: {v: asdict(one) for v, one in row.items()} for name, row in rows.items()}
    else:
        if args.model is None or args.data is None:
            parser.error("embedded: --model and --data are needed")
        settings = {
            "rounds": args.rounds,
            "warm_up": args.warm_up,
            "prompts": args.prompts or 16,
            "n": args.n,
            "slots": args.slots,
            "tau": args.tau,
        }
        with tempfile.TemporaryDirectory() as folder:
            rounds = run_embedded(args.model, args.data, Path(folder), **settings)
        found = summary(rounds)
        text = embedded_table(found)
        tree |= {**settings, "results": {name: asdict(one) for name, one in found.items()}}
        tree["rounds_measured"] = [{name: asdict(turn) for name, turn in turns.items()} for turns in rounds]
    print(text)
    if args.json:
        args.json.write_text(json.dumps(tree, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
