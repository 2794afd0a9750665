"""The loop's own time: what a step costs outside model compute, generation and weight sync.

    python -m benchmarks.loop_overhead --prompts 128 256 512 1024 --json benchmarks/results/loop_overhead.json

The real loop, trainer, host, rollout driver (a process of its own), sampler, packing, Megatron schedule, loss, metrics
and files; only two things are stubs: an engine whose responses are ready at once, and a model whose log-probs are a table
look-up. The stubs' own time is taken out. Half of the prompts are rescued, so a step holds about 1.5 n rollouts a prompt.

The headline counts CPU seconds, which other work on the machine stretches far less than wall seconds; those stand beside
them. What the other ranks are sent is pickled and read back once, as a broadcast does it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch

from benchmarks._machine import machine
from lens_megatron.algorithms.filters import PromptFilter
from lens_megatron.algorithms.rescue import RescueConfig
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rollout.engine import Finished, Health, Request, VersionSpan
from lens_megatron.rollout.factory import rescue_rules
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import SamplingConfig
from lens_megatron.types import Prompt, Rollout

TARGET_SECONDS, TARGET_PROMPTS = 3.0, 128
VOCABULARY, PADDED_VOCABULARY = 3000, 3072
PROMPT_WORDS = 100
NOT_THE_LOOPS_OWN = ("stub model", "stub engine", "weight sync")


# The stub engine, in the driver's process.


class StubEngine:
    """Every response is complete when it is asked for; `per_poll` of them come out of one poll."""

    deterministic = True

    def __init__(self, response_tokens: int, vocabulary: int, per_poll: int = 64) -> None:
        draw = random.Random(0)
        self._tokens = [draw.randrange(3, vocabulary) for _ in range(2 * response_tokens)]
        self._logprobs = [-draw.random() for _ in range(2 * response_tokens)]
        self._length, self._per_poll = response_tokens, per_poll
        self._ready: list[Request] = []
        self.version = 0
        self.seconds = 0.0

    def submit(self, requests: Sequence[Request]) -> None:
        self._ready += requests

    def poll(self, timeout: float) -> list[Finished]:
        began = time.process_time()
        now, self._ready = self._ready[: self._per_poll], self._ready[self._per_poll :]
        done = []
        for request in now:
            start = request.seed % self._length
            stop = start + self._length
            span = (VersionSpan(self.version, 0, self._length),)
            # the first token tells the reward; and responses differ, as they do in life
            tokens = (request.seed % 1000, *self._tokens[start + 1 : stop])
            done.append(Finished(request.id, tokens, tuple(self._logprobs[start:stop]), "stop", span))
        self.seconds += time.process_time() - began
        return done

    def abort(self, ids: Iterable[str]) -> None:
        if set(ids) & {request.id for request in self._ready}:
            raise ValueError("under schedule `early` nothing that was asked for becomes moot")

    def free_slots(self) -> int:
        return max(0, 256 - len(self._ready))

    def begin_update(self, version: int) -> None:
        self.version = version

    def update(self, bucket: Mapping[str, torch.Tensor]) -> None: ...

    def end_update(self) -> None: ...

    def clock(self) -> float:
        return time.monotonic()

    def health(self) -> Health:
        return Health(True, len(self._ready), 0, self.version)

    def close(self) -> None: ...


def reward(prompt: Prompt, rollout: Rollout) -> float:
    """Prompts with an even number mostly fail, unless they are purified; the others mostly succeed."""
    hard = int(prompt.id.rpartition("-")[2]) % 2 == 0
    return float(rollout.response[0] < (600 if rollout.purified else 200) if hard else rollout.response[0] < 850)


class StubSampler(Sampler):
    """The real one; tells the engine's own time with its state."""

    def state_dict(self) -> dict[str, Any]:
        assert isinstance(self.engine, StubEngine)
        return {**super().state_dict(), "engine_seconds": self.engine.seconds}


def stub_sampler(
    folder: Path,
    slots: int,
    device: str,
    dtype: str,
    sampling: SamplingConfig,
    rescue: RescueConfig,
    rewards: RewardConfig,
    seed: int,
) -> Sampler:
    """Stands for factory.embedded_sampler."""
    engine = StubEngine(sampling.max_response_tokens, VOCABULARY)
    return StubSampler(engine, reward, rescue_rules(rescue), sampling, (1,), seed)


# The stub model.


def stub_model(profile: Profile, spec: Any, layout: Any, folder: Path, *_: Any, shift: float = 0.0, **__: Any) -> Any:
    from megatron.core.enums import ModelType

    from lens_megatron.mcore.model import TokenModel, transformer_config
    from lens_megatron.mcore.step import Trainable

    class StubChunk(TokenModel):
        """log p from a table by label, so that policy and reference differ where prompts differ."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.config = transformer_config(spec, layout, torch.float32, None)
            labels_V = torch.arange(spec.vocab_size)
            self.table_V = torch.nn.Parameter(-0.5 - (labels_V % 97) / 97 - shift * (labels_V % 13))
            self.pre_process = self.post_process = True
            self.vp_stage = None
            self.model_type = ModelType.encoder_or_decoder

        def forward(self, tokens_1T: Any, positions_1T: Any, mask: Any, labels: Any, packed_seq_params: Any) -> Any:
            with profile.section("stub model"):
                logprobs_T = self.table_V[labels.labels_T]
                return torch.stack([logprobs_T, logprobs_T.detach().neg()])

        def set_input_tensor(self, input_tensor: Any) -> None: ...

        def zero_grad_buffer(self) -> None:
            self.table_V.grad = None

    class StubPolicy(Trainable):
        def export_hf(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(())

    chunk = StubChunk()
    return StubPolicy(spec, chunk.config, [chunk], StubOptimizer())  # type: ignore[arg-type]


class StubOptimizer:
    @property
    def inner(self) -> StubOptimizer:
        return self

    def zero_grad(self) -> None: ...

    def step(self, *_: Any) -> tuple[float, float, bool]:
        return 1.0, 1e-6, True


class StubSaver:
    """Checkpoints are written in the background and measured elsewhere."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def due(self, step: int, last: bool = False) -> bool:
        return False

    def poll(self) -> None: ...

    def finish(self) -> None: ...


# Where the time goes: each section's own, without the sections called from within.


@dataclass
class Profile:
    cpu: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _stack: list[list[float]] = field(default_factory=list)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        inside = [0.0, 0.0]
        self._stack.append(inside)
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            spent = time.process_time() - cpu, time.perf_counter() - wall
            self._stack.pop()
            if self._stack:
                for place in (0, 1):
                    self._stack[-1][place] += spent[place]
            self.add(name, spent[0] - inside[0], spent[1] - inside[1])

    def add(self, name: str, cpu: float, wall: float = 0.0) -> None:
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu
        self.wall[name] = self.wall.get(name, 0.0) + wall
        self.calls[name] = self.calls.get(name, 0) + 1

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                result = function(*args, **kwargs)
                return iter(list(result)) if isinstance(result, Iterator) else result

        return call


def sections() -> dict[str, list[tuple[Any, str]]]:
    from lens_megatron import host, run_folder, trainer, update
    from lens_megatron.mcore import logprobs, pipeline, step

    return {
        "choose prompts": [(host.Host, "next_prompts")],
        "purify": [(host, "purify")],
        "rebuild groups": [(host, "rebuild_group")],
        "filter": [(PromptFilter, "accept"), (PromptFilter, "finish")],
        "samples, advantages": [(host, "samples_of_group")],
        "evaluate: tensors, pairs": [(trainer, "evaluate_samples"), (update, "_score_responses")],
        "update: tensors": [(trainer, "update_policy"), (update, "minibatch_loss")],
        "update: flattening": [(update, "_flat")],
        "packing plan": [(logprobs, "plan_for_this_layout"), (step, "plan_for_this_layout")],
        "packs as tensors": [(pipeline, "pack_tensors")],
        "gather scores": [(logprobs, "score_sequences"), (step, "score_sequences")],
        "schedule, loss, backward": [(logprobs, "forward_only"), (step, "forward_backward")],
        "loss": [(update, "policy_loss")],
        "metrics": [(host.Host, "step_metrics"), (update, "finish_metrics"), (step, "sum_metrics")],
        "rollout rows (decoding)": [(host.Host, "rollout_rows")],
        "rollout table": [(run_folder, "rollout_table")],
        "write files": [(run_folder.RunFolder, "write_rollouts"), (run_folder.RunFolder, "append_metrics")],
        "weight sync": [(trainer.Trainer, "sync_weights")],
        "prompt scores": [(trainer.Trainer, "score_prompts")],
        "finish step, rest": [(trainer.Trainer, "finish_step")],
    }


@contextlib.contextmanager
def instrumented(profile: Profile) -> Iterator[None]:
    from lens_megatron import trainer
    from lens_megatron.rollout.driver import RolloutDriver

    def sample(self: RolloutDriver, *args: Any) -> Any:
        """The caller's CPU is spent on the pipe; the driver's is its own."""
        process, stub = psutil.Process(self.pid), self.state_dict()["engine_seconds"]
        before = process.cpu_times()
        with profile.section("pipe from the driver"):
            result = real_sample(self, *args)
        after = process.cpu_times()
        stub = self.state_dict()["engine_seconds"] - stub
        profile.add("stub engine", stub)
        profile.add("driver: sampler and pipe", after.user + after.system - before.user - before.system - stub)
        return result

    def broadcast(work: Callable[[], Any], what: str, silence_s: float = 0.0) -> Any:
        result = work()
        with profile.section("broadcast (pickle, read once)"):
            pickle.loads(pickle.dumps(result))
        return result

    real_sample = RolloutDriver.sample
    with contextlib.ExitStack() as stack:
        for name, places in sections().items():
            for owner, attribute in places:
                if hasattr(owner, attribute):
                    wrapped = profile.timed(name, getattr(owner, attribute))
                    stack.enter_context(patch.object(owner, attribute, wrapped))
        stack.enter_context(patch.object(RolloutDriver, "sample", sample))
        stack.enter_context(patch.object(trainer, "from_rank_zero", broadcast))
        yield


# One measurement.


def write_model(folder: Path) -> None:
    """A byte-level BPE tokenizer trained on this package's own text, and a shape that fits it. No weights."""
    from tokenizers import ByteLevelBPETokenizer

    source = Path(__file__).parent.parent / "lens_megatron"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(
        [str(path) for path in sorted(source.rglob("*.py"))], VOCABULARY, 2, False, ["<pad>", "<eos>", "<unk>"]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    from lens_megatron.data.toy import model_config

    (folder / "config.json").write_text(json.dumps({**model_config(), "vocab_size": PADDED_VOCABULARY}))


def write_prompts(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = ("the", "model", "takes", "every", "token", "of", "a", "prompt", "and", "tells", "its", "score", "again")
    with path.open("w") as file:
        for i in range(count):
            text = f"{i}: " + " ".join(draw.choice(words) for _ in range(PROMPT_WORDS))
            file.write(json.dumps({"id": f"p-{i}", "prompt": text, "answer": "1"}) + "\n")


@dataclass
class Measured:
    prompts: int
    rollouts: int
    tokens: int
    seconds: float  # CPU, a step, main process and driver, stubs taken out; the median of the steps
    wall_seconds: float
    profile: dict[str, float]  # CPU seconds a step


def measure(prompts: int, n: int, response_tokens: int, steps: int, folder: Path) -> Measured:
    """`steps` measured steps after one that warms up."""
    from lens_megatron import loop, trainer
    from lens_megatron.config import load_run
    from lens_megatron.model_spec import load_model_config
    from lens_megatron.run_folder import RunFolder

    write_model(folder / "model")
    write_prompts(folder / "train.jsonl", prompts)
    tree = {
        "model": str(folder / "model"),
        "run_dir": str(folder / "run"),
        "steps": steps + 1,
        "algorithm": "lens",
        "data": {"train": str(folder / "train.jsonl"), "prompts_per_step": prompts, "max_prompt_tokens": 512},
        "rollout": {"n": n, "max_response_tokens": response_tokens, "schedule": "early"},
        "update": {"tokens_per_microbatch": 16384},
        "checkpoint": {"every": 0},
        "precision": "fp32",
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    config = load_run(folder / "run.yaml", [])
    profile = Profile()
    marks: list[tuple[dict[str, float], float]] = []
    real_begin = trainer.Trainer.begin_step

    def mark() -> None:
        driver = profile.cpu.get("driver: sampler and pipe", 0.0) + profile.cpu.get("stub engine", 0.0)
        # the driver's time is not this process's: added, so that the total has both
        marks.append(({**profile.cpu, "total": time.process_time() + driver}, time.perf_counter()))

    def begin_step(self: Any, step: int) -> None:
        mark()
        real_begin(self, step)

    model = load_model_config(config.model)
    build = functools.partial(stub_model, profile)
    with (
        patch.dict("lens_megatron.host._SAMPLERS", embedded=stub_sampler),
        patch.object(trainer, "build_trainable", build),
        patch.object(trainer, "build_frozen", functools.partial(build, shift=0.01)),
        patch.object(trainer, "Saver", StubSaver),
        instrumented(profile),
        patch.object(trainer.Trainer, "begin_step", begin_step),
    ):
        run = trainer.Trainer(config, model, RunFolder.create(config.run_dir))
        try:
            loop.train(config, run)
            mark()
        finally:
            run.close()
    names = list(marks[-1][0])
    steps_cpu = [
        {name: after[0][name] - before[0].get(name, 0.0) for name in names} for before, after in pairwise(marks[1:])
    ]
    own = [step["total"] - sum(step.get(name, 0.0) for name in NOT_THE_LOOPS_OWN) for step in steps_cpu]
    middle = {name: statistics.median(step[name] for step in steps_cpu) for name in names if name != "total"}
    middle["everything else"] = statistics.median(step["total"] - sum(step[n] for n in middle) for step in steps_cpu)
    rows = RunFolder.open(config.run_dir).read_rollout_columns(steps, ["response"])
    return Measured(
        prompts=prompts,
        rollouts=len(rows),
        tokens=sum(len(row["response"]) for row in rows),
        seconds=statistics.median(own),
        wall_seconds=statistics.median(after[1] - before[1] for before, after in pairwise(marks[1:])),
        profile=dict(sorted(middle.items(), key=lambda item: -item[1])),
    )


def in_a_process_of_its_own(prompts: int, args: argparse.Namespace) -> Measured:
    """Megatron is initialised once a process."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, prompts, args.n, args.response_tokens, args.steps, Path(folder)).result()


def table(results: Sequence[Measured]) -> str:
    names = list(results[0].profile)
    head = ["CPU seconds a step", *(f"{r.prompts} prompts" for r in results)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(results)]
    lines.append("| **the loop's own** | " + " | ".join(f"**{r.seconds:.2f}**" for r in results) + " |")
    for name in names:
        label = f"({name}, not counted)" if name in NOT_THE_LOOPS_OWN else name
        lines.append(f"| {label} | " + " | ".join(f"{r.profile.get(name, 0.0):.3f}" for r in results) + " |")
    lines.append("| rollouts | " + " | ".join(f"{r.rollouts:,}" for r in results) + " |")
    lines.append("| response tokens | " + " | ".join(f"{r.tokens:,}" for r in results) + " |")
    lines.append("| wall seconds, all | " + " | ".join(f"{r.wall_seconds:.1f}" for r in results) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="a Markdown table is written beside it")
    args = parser.parse_args()
    results = [in_a_process_of_its_own(prompts, args) for prompts in args.prompts]
    print(table(results))
    growth = (results[-1].seconds / results[0].seconds) / (results[-1].prompts / results[0].prompts)
    print(f"\ngrowth over {results[0].prompts} -> {results[-1].prompts} prompts: {growth:.2f} of linear")
    if args.json:
        tree = {
            **machine(),
            "n": args.n,
            "response_tokens": args.response_tokens,
            "steps": args.steps,
            "target": {"prompts": TARGET_PROMPTS, "seconds": TARGET_SECONDS},
            "growth_against_linear": round(growth, 3),
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(tree, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
