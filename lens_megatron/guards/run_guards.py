"""The guards of one run: when each looks, and what it took. Every rank calls, in the same order."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lens_megatron.guards import checks
from lens_megatron.guards.config import GuardConfig, ModelGuardConfig
from lens_megatron.guards.mismatch import watch_mismatch
from lens_megatron.guards.streamed import different_exports, streamed_logprobs
from lens_megatron.mcore.checkpoint import dtype_of
from lens_megatron.mcore.checksums import SCHEME, differing_replicas, state_checksums
from lens_megatron.mcore.rendezvous import from_rank_zero
from lens_megatron.mcore.routing import replay_routing
from lens_megatron.mcore.step import ShardedModel, Trainable
from lens_megatron.routed_experts import Routing
from lens_megatron.update import Evaluated


class ModelGuards:
    """Of whatever trains a model. `budget`: tokens at once."""

    def __init__(self, config: ModelGuardConfig, budget: int, timeout_s: float) -> None:
        self._model_config, self._budget, self._timeout_s = config, budget, timeout_s
        self._skipped_in_row = 0
        self._expected: dict[Path, tuple[Tensor, Routing | None]] = {}  # of the probe, by folder
        self._seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        """Of a guard that looks elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def times(self) -> dict[str, float]:
        """time/guards/NAME since the last call, and time/guards in all. The first step's hold those after loading."""
        times = {f"time/guards/{name}": seconds for name, seconds in self._seconds.items()}
        total = sum(self._seconds.values())
        self._seconds = {}
        return {**times, "time/guards": total}

    # after loading

    def after_loading(self, model: ShardedModel, who: str, folder: Path) -> None:
        if self._model_config.hf_parity:
            with self._timed("hf_parity"):
                self._hf_parity(model, who, folder)
        if self._model_config.export_parity and isinstance(model, Trainable):
            with self._timed("export_parity"):
                found = model.export_hf_to(
                    lambda exported: different_exports(folder, exported), "compare the export", self._timeout_s
                )
                checks.export_parity(str(folder), *found)

    def _hf_parity(self, model: ShardedModel, who: str, folder: Path) -> None:
        length = min(self._model_config.probe_tokens, model.spec.max_positions)
        probe = checks.probe_text(model.spec.vocab_size, length)
        # rank 0 computes alone while the others wait on the store: the collectives of the sharded model come after
        if folder not in self._expected:  # policy and reference are often the same
            self._expected[folder] = from_rank_zero(
                lambda: streamed_logprobs(folder, probe), "compute the probe from the HF files", self._timeout_s
            )
        expected_T, experts = self._expected[folder]
        # in bf16 a router near a tie takes another expert, which is no fault: it is given those of the fp32 computation
        routing = experts if precision(model) == "bf16" else None
        sequences = [torch.tensor(probe)] * 2  # a second sequence in the pack must not see the first
        with replay_routing(model.chunks, sequences, [routing] * 2):
            scores = model.score(sequences, self._budget)
        bound = self._model_config.for_probe(precision(model), float(expected_T.abs().mean()))
        for logprobs_T in scores.logprobs:
            checks.hf_parity(who, str(folder), logprobs_T[1:], expected_T, bound)

    # around an update

    def compare_replicas(self, step: int, models: Mapping[str, ShardedModel | None]) -> None:
        """Before the update of `step`, from 0: an update writes what it gathers over what was damaged."""
        every = self._model_config.replicas_every
        if every == 0 or step % every:
            return
        with self._timed("replicas"):
            for who, model in models.items():
                if model is not None:
                    names = differing_replicas(model)
                    where = "data parallel, or copies under tensor or context parallelism, or a tied embedding's two"
                    checks.replicas(who, names, where, step + 1)

    def count_skipped(self, skipped: bool, loss: float, norm: float) -> None:
        self._skipped_in_row = self._skipped_in_row + 1 if skipped or loss != loss else 0
        checks.skipped(self._skipped_in_row, self._model_config.skipped_in_row, loss, norm)


class RunGuards(ModelGuards):
    """Of a run with an engine and perhaps a reference besides."""

    def __init__(
        self,
        config: GuardConfig,
        temperature: float,
        budget: int,
        timeout_s: float,
        staleness: int = 0,
        routing_replay: bool = False,
    ) -> None:
        super().__init__(config, budget, timeout_s)
        self.config, self._temperature, self._staleness = config, temperature, staleness
        self._routing_replay = routing_replay

    def first_scores(self, policy: Sequence[Tensor], reference: Sequence[Tensor], model: ShardedModel) -> None:
        """Of prompts, before the first update of the reference's own weights: interference scores are all 0."""
        if self.config.first_step:
            bound = self.config.within_trainer(precision(model))
            checks.first_step([p[1:] for p in policy], [r[1:] for r in reference], bound)

    def before_update(
        self,
        step: int,
        groups: Sequence[list[Evaluated]],
        policy: Trainable,
        reference: ShardedModel | None,
        *,
        same_weights: bool,
        engine_stands_in: bool,
    ) -> tuple[list[list[Evaluated]], dict[str, float]]:
        """The groups to train on, and metrics. `same_weights`: this is the first update, of the reference's own weights;
        `engine_stands_in`: pi_old is the engine's own, so that there is nothing to compare it with."""
        self.compare_replicas(step, {"policy": policy, "reference": reference})
        if same_weights and self.config.first_step and not engine_stands_in:
            with self._timed("first_step"):
                # a purified rollout's pi_old is under another prompt than the reference
                pairs = [
                    (e.proximal_R, e.reference_R)
                    for group in groups
                    for e in group
                    if not e.sample.purified and e.proximal_R is not None and e.reference_R is not None
                ]
                checks.first_step([p for p, _ in pairs], [r for _, r in pairs], self._to_reference(policy))
        if engine_stands_in:
            return [list(group) for group in groups], {}
        with self._timed("logprob_diff"):
            return watch_mismatch(groups, self.config, self._to_engine(policy), self._temperature)

    def _to_reference(self, policy: ShardedModel) -> float:
        """The bound on rollouts; replayed experts are the engine's choice, and the reference's routers choose themselves."""
        bounds = self.config.to_engine if self._routing_replay else self.config.within_trainer
        return bounds(precision(policy))

    def _to_engine(self, model: ShardedModel) -> float:
        """The bound; none by default for rollouts of older weights, which differ by what was learnt since."""
        if self._staleness and self.config.logprob_diff is None:
            return math.inf
        return self.config.to_engine(precision(model))

    def after_update(self, metrics: Mapping[str, float], policy: ShardedModel, before_any: bool) -> None:
        """`before_any`: KL and mismatch were measured with policy and reference of the same weights."""
        if self.config.on_logprob_diff == "stop" and "logprob_diff" in metrics:
            checks.engine_difference(metrics["logprob_diff"], None, self._to_engine(policy), self._temperature)
        if before_any and self.config.first_step and "kl_original" in metrics:
            checks.first_kl(metrics["kl_original"], self._to_reference(policy))
        skipped = metrics.get("skipped", 0.0) > 0.0  # one of several mini-batches counts: it may be so in every step
        self.count_skipped(skipped, metrics.get("loss", 0.0), metrics.get("grad_norm", 0.0))
        if self.config.entropy_masks and "entropy_high" in metrics and "entropy_low" in metrics:
            checks.entropy_masks(metrics["entropy_high"], metrics["entropy_low"])

    # around a checkpoint

    def state(self, policy: Trainable) -> dict[str, int]:
        """To be saved with the checkpoint."""
        if not self.config.resume_parity:
            return {}
        with self._timed("resume_parity"):
            return state_checksums(policy)

    def after_resume(self, policy: Trainable, folder: Path, saved: Mapping[str, int], dtype: str) -> None:
        """`saved`: what `state` said then; empty for a checkpoint that tools have changed. An earlier version's are not
        comparable."""
        if not self.config.resume_parity or saved.get("scheme") != SCHEME:
            return
        with self._timed("resume_parity"):
            loaded = state_checksums(policy)
            # in another precision the weights are rounded; their fp32 copies in the optimizer are not
            same = dtype == dtype_of(policy)
            wanted = {name: value for name, value in saved.items() if same or name != "weights"}
            checks.resume_parity(str(folder), wanted, loaded)


def precision(model: ShardedModel) -> str:
    return "bf16" if model.config.params_dtype == torch.bfloat16 else "fp32"
