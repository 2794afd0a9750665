"""What rank 0 alone holds: data, prompt filter, rollout driver, run folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lens_megatron import strict
from lens_megatron.ahead import Ahead
from lens_megatron.algorithms.filters import NotEnoughGroups, PromptFilter
from lens_megatron.algorithms.group_metrics import group_metrics, top_k_overlap
from lens_megatron.algorithms.outcomes import is_success
from lens_megatron.algorithms.rescue import RebuiltGroup, rebuild_group
from lens_megatron.algorithms.transfer import TransferTracker
from lens_megatron.config import RunConfig
from lens_megatron.data.prompts import PromptStream, first_prompt, load_prompts
from lens_megatron.data.tokenizer import TokenPieces, check_tokenizer, load_tokenizer, special_ids
from lens_megatron.errors import RunError, UsageError
from lens_megatron.evaluation.answering import Limits
from lens_megatron.evaluation.results import metric_names, step_metrics
from lens_megatron.evaluation.sets import load_sets, questions, with_benchmark_rules
from lens_megatron.fingerprints import PassingSums
from lens_megatron.guards import checks
from lens_megatron.model_spec import ModelConfig, named_template, template_origin
from lens_megatron.precision import dtype_name
from lens_megatron.purification.strategies import Outcome, Signals, purify
from lens_megatron.rewards.answerable import check_answers, check_functions
from lens_megatron.rollout.driver import RolloutDriver
from lens_megatron.rollout.factory import embedded_sampler, sglang_sampler
from lens_megatron.rollout.sampling import SampleCounts, SampleResult, SamplingConfig
from lens_megatron.rollout.sglang_supervised import supervised_folder
from lens_megatron.rollout.weight_sync.snapshot import Snapshots, forget_snapshots, snapshot_folder
from lens_megatron.rollout_table import RolloutRow
from lens_megatron.run_folder import RunFolder
from lens_megatron.samples import samples_of_group
from lens_megatron.tracking import Trackers
from lens_megatron.types import Prompt, Sample
from lens_megatron.update import Evaluated

_SAMPLERS: dict[str, Any] = {"embedded": embedded_sampler, "sglang": sglang_sampler}
_IMPORT_SECONDS = 120.0  # of the rollout driver, before it starts or meets any server
_BATCHES_A_STEP = 1000  # room in the sampler's step number for the batches that a filter may ask for


class Host:
    """Built before CUDA is touched: the rollout driver is a process of its own."""

    def __init__(self, config: RunConfig, model: ModelConfig, weights: Path, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        check_functions(config.rewards)
        self.tokenizer = load_tokenizer(str(weights))
        check_tokenizer(self.tokenizer, model.spec.vocab_size)
        if config.rollout.routing_replay and model.spec.moe is None:
            raise UsageError(f"rollout.routing_replay: {config.model} has no experts to route to: leave it out")
        loaded = load_prompts(config.data, self.tokenizer, model.template)
        self.too_long = loaded.too_long
        self.stream = PromptStream(loaded.prompts, config.seed, config.data.shuffle)
        if config.data.prompts_per_step > len(self.stream):  # before any model is loaded
            raise UsageError(
                f"{config.data.train}: data.prompts_per_step is {config.data.prompts_per_step}, and there are "
                f"{len(self.stream)} prompts ({self.too_long} more are too long): lower it"
            )
        self._ahead: Ahead | None = None
        origin = template_origin("data.template", config.data.template, model.template_from)
        self.data_notes = [
            first_prompt(self.tokenizer, loaded.prompts[0].tokens, origin),
            f"{len(self.stream)} prompts; left out as longer than data.max_prompt_tokens: {self.too_long}; "
            f"system messages without a place in the template: {loaded.systems_dropped}",
        ]
        if doubtful := check_answers(loaded.prompts, config.rewards, config.data.train):
            self.data_notes.append(f"{config.data.train}: {doubtful}")
        template = named_template(config.data.template, model.template)
        self.benchmarks = load_sets(config.evaluation, self.tokenizer, template)
        self.benchmark_names = metric_names(self.benchmarks)
        self._answer_limits = Limits(
            config.evaluation.max_response_tokens or config.rollout.max_response_tokens,
            model.spec.max_positions,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
            stall_seconds=config.rollout.stall_seconds,
        )
        self.prompt_filter = PromptFilter(config.algorithm.filter, config.data.prompts_per_step, config.seed)
        self.special_ids = special_ids(self.tokenizer)
        sampling = SamplingConfig(
            **{field.name: getattr(config.rollout, field.name) for field in fields(SamplingConfig)}
        )
        self.driver = RolloutDriver(
            partial(
                _SAMPLERS[config.rollout.engine],
                weights,
                config.rollout.slots,
                "cuda" if torch.cuda.is_available() else "cpu",
                dtype_name(config.precision),
                sampling,
                config.algorithm.rescue,
                with_benchmark_rules(config.rewards) if self.benchmarks else config.rewards,
                config.seed,
                **_of_the_servers(config, folder),
            ),
            threads=config.rollout.threads,
            start_seconds=config.rollout.server.start_timeout_s + _IMPORT_SECONDS,
            silence_seconds=config.timeout_s,
            # an update may wait for a server that is being started again
            command_seconds=config.timeout_s
            + config.rollout.server.start_timeout_s * (config.rollout.engine == "sglang"),
        )
        self.trackers = Trackers(config.tracking, folder.path, config.name, strict.to_tree(RunConfig, config))
        self.transfer = TransferTracker()
        self._pieces = TokenPieces(self.tokenizer)
        self._reward_counts: dict[str, float] = {}
        self.check_seconds = 0.0  # of the engine's weights, since the last step's line
        self._deleted: dict[str, list[int]] = {}  # at each prompt's last purification
        self.begin_step(0)

    # one step

    def begin_step(self, step: int) -> None:
        """With the rollouts that were made ahead of it, if there are any."""
        self.step, self._batch = step, 0
        self._groups: list[RebuiltGroup] = []
        self._outcomes: list[Outcome] = []
        self._signals: dict[str, Signals] = {}
        self._counts: list[SampleCounts] = []
        self.await_ahead()
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            self.prompt_filter.begin_step(step, self.stream.epoch)
        else:
            assert ahead.step == step
            assert ahead.result is not None
            self._take_in(ahead.prompts, ahead.signals, ahead.result)

    def next_prompts(self) -> list[Prompt]:
        """The next batch to roll out; empty when the step has its groups."""
        try:
            size = self.prompt_filter.next_batch_size()
        except NotEnoughGroups as error:
            raise RunError(str(error)) from None
        chosen: list[Prompt] = []
        while size is not None and len(chosen) < size:
            candidates = self.stream.take(size - len(chosen))
            wanted = self.prompt_filter.propose([prompt.id for prompt in candidates])
            chosen += [prompt for prompt, roll_out in zip(candidates, wanted, strict=True) if roll_out]
        return chosen

    def roll_out(self, prompts: Sequence[Prompt], signals: Sequence[Signals]) -> None:
        """Original and rescue rollouts of these prompts, judged, rebuilt into training groups and filtered."""
        purified = [outcome.rescue_prompt for outcome in self._purify(prompts, signals, self.step)]
        result = self.driver.sample(
            prompts, purified or [None] * len(prompts), self.step * _BATCHES_A_STEP + self._batch
        )
        self._take_in(prompts, signals, result)

    def _purify(self, prompts: Sequence[Prompt], signals: Sequence[Signals], step: int) -> list[Outcome]:
        """One outcome a prompt; none without rescues."""
        rescue, seed = self.config.algorithm.rescue, self.config.seed
        if rescue.mode == "none":
            return []
        return [
            purify(prompt, rescue, self.special_ids, signal, seed, step)
            for prompt, signal in zip(prompts, signals, strict=True)
        ]

    def _take_in(self, prompts: Sequence[Prompt], signals: Sequence[Signals], result: SampleResult) -> None:
        """A batch of this step, rolled out: rebuilt into training groups and filtered."""
        algorithm, seed = self.config.algorithm, self.config.seed
        if self.config.guards.engine_weights:
            rollouts = [r for group in result.groups for r in (*group.originals, *group.purified)]
            oldest = self.step - self.config.rollout.staleness
            checks.weight_version([rollout.weight_version for rollout in rollouts], oldest, self.step)
        self._batch += 1
        if algorithm.rescue.mode != "none":
            self._outcomes += self._purify(prompts, signals, self.step)
            self._signals.update({p.id: signal for p, signal in zip(prompts, signals, strict=True)})
        learns_from = algorithm.advantage.learns_from
        rebuilt = [rebuild_group(group, algorithm.rescue, seed, self.step, learns_from) for group in result.groups]
        self.prompt_filter.accept(rebuilt)
        self._groups += rebuilt
        self._counts.append(result.counts)

    # the next step's first batch, while this step trains

    def draw_ahead(self, step: int) -> list[Prompt]:
        before = self.stream.state_dict()
        self.prompt_filter.begin_step(step, self.stream.epoch)
        self._ahead = Ahead(step, self.next_prompts(), before)
        return self._ahead.prompts

    def start_ahead(self, signals: Sequence[Signals]) -> None:
        ahead = self._ahead
        assert ahead is not None
        ahead.signals = signals
        purified = [outcome.rescue_prompt for outcome in self._purify(ahead.prompts, signals, ahead.step)]
        self.driver.start_sampling(ahead.prompts, purified or [None] * len(ahead.prompts), ahead.step * _BATCHES_A_STEP)

    def await_ahead(self) -> None:
        ahead = self._ahead
        while ahead is not None and ahead.result is None:
            ahead.result = self.driver.sampled(1.0)

    def training_groups(self) -> list[list[Sample]]:
        self._trained = self.prompt_filter.finish()
        self._filter_metrics = self.prompt_filter.metrics()
        return [
            samples_of_group(group, self.config.algorithm.advantage, self.config.rollout.max_response_tokens)
            for group in self._trained
        ]

    def step_metrics(self) -> dict[str, float]:
        """Of everything rolled out in this step."""
        rollouts = [rollout for group in self._groups for rollout in group.group.originals]
        metrics = group_metrics(self._groups, self._outcomes)
        metrics["response_tokens"] = sum(len(rollout.response) for rollout in rollouts) / len(rollouts)
        metrics["truncated_ratio"] = sum(rollout.finish == "length" for rollout in rollouts) / len(rollouts)
        metrics.update(self._filter_metrics)
        lags = [self.step - rollout.weight_version for rollout in rollouts]
        metrics["staleness"], metrics["staleness_max"] = sum(lags) / len(lags), float(max(lags))
        metrics.update(self.transfer.update(self.step, self._groups))
        deleted = {o.prompt_id: list(o.purified_prompt.deleted) for o in self._outcomes if o.purified_prompt}
        if (overlap := top_k_overlap(self._deleted, deleted)) is not None:
            metrics["purification/overlap_with_last_time"] = overlap
        self._deleted.update(deleted)
        totals: dict[str, float] = {}
        for counts in self._counts:
            for name, value in asdict(counts).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        metrics["data/checksum"] = float(self.stream.checksum())
        metrics.update(self._reward_health())
        metrics["time/reward"] = totals.pop("reward_seconds")
        metrics.update({f"sampling/{name}": value for name, value in totals.items()})
        metrics["tokens"] = totals["original_tokens"] + totals["purified_tokens"]
        return metrics

    def _reward_health(self) -> dict[str, float]:
        """What became of the judgements since the last step; of a batch that runs ahead as far as it is."""
        now = self.driver.reward_health()
        step = {name: count - self._reward_counts.get(name, 0.0) for name, count in now.items()}
        self._reward_counts = now
        failed = sum(step.get(name, 0.0) for name in ("timeouts", "memory", "crashes"))
        settled = sum(step.get(name, 0.0) for name in ("judged", "cached", "too_long"))
        checks.reward_failures(failed, settled, self.config.guards.reward_failures)
        return {"rewards/failed": failed}

    def rollout_rows(self, groups: Sequence[list[Evaluated]]) -> Iterator[RolloutRow]:
        """Every rollout of the step, with what became of it."""
        pieces: dict[str, list[str]] = {}  # by prompt: its rollouts' rows share one list
        trained = {id(group): evaluated for group, evaluated in zip(self._trained, groups, strict=True)}
        for group in self._groups:
            prompt = group.group.prompt
            if prompt.id not in pieces:
                pieces[prompt.id] = self._pieces(prompt.tokens)
            evaluated = trained.get(id(group))
            members = {(m.rollout.purified, m.rollout.index): place for place, m in enumerate(group.members)}
            scores_T = self._signals[prompt.id].scores_T if prompt.id in self._signals else None
            scores = [None if score != score else score for score in scores_T.tolist()] if scores_T is not None else []
            purified = group.group.purified_prompt
            for rollout in (*group.group.originals, *group.group.purified):
                place = members.get((rollout.purified, rollout.index))
                known = evaluated[place] if evaluated is not None and place is not None else None
                sample = known.sample if known is not None else None
                proximal_R = known.proximal_R if known is not None else None
                origin = (
                    group.members[place].origin if place is not None else "unused" if rollout.purified else "removed"
                )
                yield RolloutRow(
                    step=self.step + 1,
                    prompt_id=prompt.id,
                    source=prompt.source,
                    answer=prompt.answer,
                    question=prompt.text,
                    index=rollout.index,
                    purified=rollout.purified,
                    origin=origin,
                    trained=sample is not None,
                    prompt_tokens=prompt.tokens,
                    prompt_pieces=pieces[prompt.id],
                    scores=scores,
                    deleted=purified.deleted if purified else (),
                    roll_tokens=rollout.roll_tokens,
                    response=rollout.response,
                    response_text=self.tokenizer.decode(rollout.response),
                    reward=rollout.reward,
                    success=is_success(rollout.reward, self.config.algorithm.rescue.success_threshold),
                    finish=rollout.finish,
                    advantage=sample.advantage if sample else None,
                    weight=sample.weight if sample else None,
                    behaviour_logprobs=rollout.behaviour_logprobs,
                    proximal_logprobs=proximal_R.tolist() if proximal_R is not None else None,
                    weight_version=rollout.weight_version,
                )

    # held-out problems

    def benchmark(self, step: int) -> dict[str, float]:
        """Answered by the run's engine with the weights it has."""
        wanted = questions(self.benchmarks, self.config.seed, step)
        self._answers = self.driver.evaluate(wanted, self._answer_limits)
        return step_metrics(self.benchmarks, self._answers)

    def keep_answers(self, step: int) -> None:
        """Every answer of the last benchmark, in the run folder."""
        self.folder.write_evaluation(step, [asdict(answer) for answer in self._answers])

    # the run

    def probe_tokens(self, count: int) -> list[int]:
        """Text of the data, over and over: what the engine's weights are compared with the trainer's by."""
        tokens = [token for prompt in self.stream.first(count) for token in prompt.tokens]
        return (tokens * count)[:count]

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        sums = PassingSums()
        watched = self.config.guards.engine_weights
        self.driver.load_weights(buckets(sums.of(tensors) if watched else tensors), version)
        if watched:
            with sums.timed():
                held = self.driver.weight_checksums()
                if held is not None:
                    checks.engine_checksums(sums.sums, held, version)
            self.check_seconds += sums.seconds

    def state_dict(self) -> dict[str, Any]:
        ahead = self._ahead
        return {
            "data": self.stream.state_dict() if ahead is None else ahead.stream_before,
            "filter": self.prompt_filter.state_dict(),
            "sampler": self.driver.state_dict(),
            "transfer": self.transfer.state_dict(),
            "deleted": self._deleted,
            "ahead": None if ahead is None else ahead.tree(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state["data"])
        self.prompt_filter.load_state_dict(state["filter"])
        self.driver.load_state_dict(state["sampler"])
        self.transfer.load_state_dict(state["transfer"])
        self._deleted = dict(state["deleted"])
        # without staleness from here on, its prompts are drawn again and rolled out by the weights of the day
        if (ahead := state.get("ahead")) is not None and self.config.rollout.staleness:
            self.draw_ahead(ahead["step"])
            assert self._ahead is not None
            self._ahead.restore(ahead)

    def close(self) -> None:
        self.driver.close()
        for complaint in self.trackers.close():
            print(complaint, file=sys.stderr)
        self.folder.close()


def _of_the_servers(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """What a sampler that works with servers is told besides."""
    rollout, colocated = config.rollout, config.placement == "colocated"
    if rollout.engine != "sglang":
        return {}
    first_gpu = 0 if colocated else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first_gpu = rollout.server.first_gpu if rollout.server.first_gpu is not None else first_gpu
    needed, there = first_gpu + rollout.servers * rollout.server.gpus, torch.cuda.device_count()
    here = not rollout.server.urls and supervised_folder() is None  # else other machines have them
    if here and 0 < there < needed:
        raise UsageError(
            f"rollout.servers: {rollout.servers} of {rollout.server.gpus} GPUs from GPU {first_gpu} on need {needed} GPUs, "
            f"this machine has {there}: lower rollout.servers or rollout.server.tp, or set placement: colocated"
        )
    snapshots = snapshot_folder(rollout.sync, folder.path)
    forget_snapshots(snapshots)
    return {
        "servers": rollout.servers,
        "server": rollout.server,
        "logs": folder.path / "logs",
        "first_gpu": first_gpu,
        "colocated": colocated,
        "in_place": rollout.sync.in_flight == "in_place",
        # what the disk transport has written, where it was used, brings a restarted server back
        "resync": Snapshots(snapshots, rollout.sync.timeout_s).resync,
    }


def buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], most_bytes: int = 256 * 2**20
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors in order, up to `most_bytes` at a time; a larger one travels alone."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if bucket and size + bytes_ > most_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += bytes_
    if bucket:
        yield bucket
