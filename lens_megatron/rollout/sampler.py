"""The sampler: one batch of prompts in, complete groups out, under three schedules of the rescue rollouts.

after_group   Y' starts when all of Y is scored and the success rate is below tau (the paper's order).
early         Y' starts as soon as the rollouts of Y finished so far make that certain.
speculative   Y' starts when slots are free, likeliest rescues first, and is cancelled once enough successes of Y make
              it moot.

A schedule decides when, never whether: Y' is cancelled by what Y alone came to, and is otherwise awaited whole, so the
groups are samples of the same distribution, and the same samples under an engine that heeds a request's seed. Under one
that does not, a rollout that was aborted goes on from the tokens that it had: drawn afresh, those that were long enough to
be aborted would get another chance to be short.
Admission is done here: nothing is submitted beyond the engine's free slots, originals enter first, certain rescues next,
and speculation gives way to both.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any

from lens_megatron.errors import RunError
from lens_megatron.rollout.engine import Engine, Finished, Request, derive_seed
from lens_megatron.rollout.group_state import GroupState, Job
from lens_megatron.rollout.history import SuccessHistory, chance_below
from lens_megatron.rollout.sampling import RescueRules, SampleCounts, SampleResult, SamplingConfig
from lens_megatron.types import Prompt, PurifiedPrompt, Rollout

Reward = Callable[[Prompt, Rollout], "float | Future[float]"]
POLL_SECONDS = 1.0
POLL_SECONDS_WITH_REWARDS_PENDING = 0.02
PATIENCE_AFTER_AN_ERROR = 5.0
MAX_ABORTS = 3  # of one rollout, by the engine


class SamplingAborted(RunError):
    """`Sampler.stop` was called."""


class Sampler:
    """Holds what lasts from step to step: the engine, how to score, and each prompt's success so far."""

    def __init__(
        self,
        engine: Engine,
        reward: Reward,
        rules: RescueRules,
        config: SamplingConfig,
        stop_tokens: Sequence[int],
        seed: int,
    ) -> None:
        self.engine, self.reward, self.rules, self.config = engine, reward, rules, config
        self.stop_tokens, self.seed = tuple(stop_tokens), seed
        self.history = SuccessHistory()
        self._stop = threading.Event()
        self.turned_at = time.monotonic()  # when its loop last went round: a watcher's

    def stop(self) -> None:
        """From any thread: the sampling in progress ends with SamplingAborted, and leaves the engine idle."""
        self._stop.set()

    def stopping(self) -> bool:
        """Asked once a round by whatever loop uses the engine."""
        self.turned_at = time.monotonic()
        return self._stop.is_set()

    def close(self) -> None:
        self.engine.close()
        if callable(close := getattr(self.reward, "close", None)):
            close()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state["history"])

    def sample(
        self,
        prompts: Sequence[Prompt],
        purified: Sequence[PurifiedPrompt | None],
        step: int,
        config: SamplingConfig | None = None,
    ) -> SampleResult:
        """Groups in the order of the prompts. `step` and the seed decide every draw."""
        if len(prompts) != len(purified):
            raise ValueError(f"{len(prompts)} prompts, {len(purified)} purified prompts")
        batch = _Batch(self, prompts, purified, step, config or self.config)
        try:
            batch.run()
        except BaseException:
            self._stop.clear()
            batch.leave_engine_idle(PATIENCE_AFTER_AN_ERROR, strict=False)
            raise
        batch.leave_engine_idle(batch.config.stall_seconds)
        groups = [state.group() for state in batch.groups]
        self.history.record([(group.prompt.id, [r.reward for r in group.originals]) for group in groups])
        return SampleResult(groups, batch.counts)


class _Batch:
    """One call of `sample`."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        purified: Sequence[PurifiedPrompt | None],
        step: int,
        config: SamplingConfig,
    ) -> None:
        self.sampler, self.engine, self.step, self.config = sampler, sampler.engine, step, config
        self.groups = [GroupState(g, x, x_, config.n) for g, (x, x_) in enumerate(zip(prompts, purified, strict=True))]
        self.counts = SampleCounts()
        self.wanted = deque(Job(g, i, False) for g in range(len(prompts)) for i in range(config.n))
        self.in_flight: dict[str, Job] = {}
        self.inbox: deque[Finished] = deque()
        self.speculating: set[str] = set()  # in flight, not cancelled, rescue still open
        self.aborts: Counter[tuple[int, int, bool]] = Counter()
        self.submissions = 0
        self.cancelled: set[str] = set()
        self.scoring: dict[Future[float], tuple[Job, Rollout]] = {}
        self.likely: list[tuple[float, int, int]] = []  # heap of (-chance of rescue, group, rewards it rests on)
        self.settled = 0
        self.start = self.last_progress = self.engine.clock()
        self.last_health_check, self.progress = self.start, -1
        for g in range(len(prompts)):
            self._review(g)

    def run(self) -> None:
        while self.settled < len(self.groups):
            if self.sampler.stopping():
                raise SamplingAborted("sampling was aborted")
            self._admit()
            pending = bool(self.scoring)
            self.inbox.extend(self.engine.poll(POLL_SECONDS_WITH_REWARDS_PENDING if pending else POLL_SECONDS))
            moved = bool(self.inbox)
            while self.inbox:
                self._finished(self.inbox.popleft())
            moved |= self._collect_rewards()
            self._watch_for_stalls(moved)
        self.counts.seconds = self.engine.clock() - self.start

    def leave_engine_idle(self, patience: float, strict: bool = True) -> None:
        """What was cancelled may still be running somewhere; the next weights must not meet it."""
        self.engine.abort(list(self.in_flight))
        deadline = self.engine.clock() + patience
        while True:
            self.sampler.stopping()
            for response in self.inbox:
                if job := self.in_flight.pop(response.id, None):
                    self._wasted(self._whole(job, response))
            if not self.in_flight or self.engine.clock() > deadline:
                break
            self.inbox = deque(self.engine.poll(POLL_SECONDS))
        for future in self.scoring:
            future.cancel()
        if self.in_flight and strict:
            raise RunError(f"{len(self.in_flight)} aborted rollouts never came back: {self.engine.health()}")

    # admission

    def _admit(self) -> None:
        free = self.engine.free_slots()
        short = len(self.wanted) - free
        if short > 0 and self.speculating:
            self._make_room(short)
        requests = []
        while free > 0 and self.wanted:
            requests.append(self._request(self.wanted.popleft()))
            free -= 1
        while free > 0 and not self.wanted and (job := self._next_speculation()):
            requests.append(self._request(job))
            free -= 1
        if requests:
            self.engine.submit(requests)

    def _next_speculation(self) -> Job | None:
        while self.likely:
            chance, g, evidence = self.likely[0]
            state = self.groups[g]
            current = state.rescue == "open" and evidence == len(state.scored) and state.unsubmitted
            if not current:
                heapq.heappop(self.likely)
            elif -chance < self.config.speculate_from:
                return None
            else:
                return replace(state.unsubmitted.pop(0), speculative=True)
        return None

    def _make_room(self, short: int) -> None:
        """The least likely speculation leaves for rollouts that are needed; once back, it waits for room again."""
        jobs = [(request_id, self.in_flight[request_id]) for request_id in sorted(self.speculating)]
        leaving = [(self._chance(job.group), -job.group, -job.index, request_id) for request_id, job in jobs]
        self._cancel([request_id for *_, request_id in heapq.nsmallest(short - len(self.cancelled), leaving)])

    def _request(self, job: Job) -> Request:
        state, config = self.groups[job.group], self.config
        # numbered, so that a rollout that starts again is not taken for its aborted first half
        request_id = f"{self.step}/{job.group}/{'xp'[job.purified]}{job.index}/{self.submissions}"
        self.submissions += 1
        self.in_flight[request_id] = job
        if job.purified:
            state.rescue_ids.append(request_id)
        if job.speculative:
            self.speculating.add(request_id)
            self.counts.speculated_rollouts += job.begun is None
        begun = job.begun.tokens if job.begun else ()
        return Request(
            request_id,
            state.roll_tokens(job) + begun,
            config.max_response_tokens - len(begun),
            self.sampler.stop_tokens,
            config.temperature,
            config.top_p,
            # the same rollout whatever the schedule and the attempt
            derive_seed(self.sampler.seed, self.step, job.group, state.prompt.id, job.index, job.purified),
            priority=2 if job.speculative else int(job.purified),
            routing=config.routing_replay,
        )

    # what comes back

    def _finished(self, response: Finished) -> None:
        job = self.in_flight.pop(response.id, None)
        if job is None:
            raise RunError(f"the engine returned a response that nobody is waiting for: {response.id}")
        by_us = response.id in self.cancelled
        self.cancelled.discard(response.id)
        self.speculating.discard(response.id)
        state, response = self.groups[job.group], self._whole(job, response)
        if job.purified and state.rescue == "moot":
            self._wasted(response)
            return
        if response.finish == "abort":
            self._aborted(job, response, by_us)
            return
        rollout = Rollout(
            state.prompt.id,
            state.roll_tokens(job),
            response.tokens,
            response.logprobs,
            response.finish,
            job.index,
            job.purified,
            weight_version=response.oldest_version,
            routing=response.routing,
        )
        reward = self.sampler.reward(state.prompt, rollout)
        if isinstance(reward, Future):
            self.scoring[reward] = (job, rollout)
        else:
            self._scored(job, replace(rollout, reward=float(reward)))

    def _whole(self, job: Job, response: Finished) -> Finished:
        """With what it had before an abort."""
        self.counts.speculated_tokens += len(response.tokens) * job.speculative
        if job.begun is not None:
            response = job.begun.followed_by(response)
        whole = response.completed(self.sampler.stop_tokens, self.config.max_response_tokens)
        if whole.finish != "abort" and self.config.routing_replay and whole.routing is None:
            # nothing is left to be asked for, and so its experts neither: drawn once more
            return replace(response, finish="abort", tokens=(), logprobs=(), versions=())
        return whole

    def _aborted(self, job: Job, part: Finished, by_us: bool) -> None:
        """It gave way to others, or its server went away or took new weights: it waits for room again."""
        if not by_us:
            key = (job.group, job.index, job.purified)
            self.aborts[key] += 1
            if self.aborts[key] > MAX_ABORTS:
                raise RunError(f"the engine aborted a rollout {self.aborts[key]} times: {self.engine.health()}")
            self.counts.resubmitted_rollouts += 1
        if self.engine.deterministic:  # its seed draws the same tokens again
            self._wasted(part)
        job = replace(job, speculative=False, begun=None if self.engine.deterministic or not part.tokens else part)
        state = self.groups[job.group]
        if job.purified and state.rescue == "open":
            state.unsubmitted = sorted([*state.unsubmitted, job], key=lambda waiting: waiting.index)
            self._review(job.group)
        else:
            self.wanted.appendleft(job)

    def _collect_rewards(self) -> bool:
        if not self.scoring:
            return False
        began = time.perf_counter()
        if self.engine.deterministic:  # what is submitted next must not depend on how fast rewards are
            wait(self.scoring, timeout=self.config.stall_seconds)
        elif not self.in_flight:
            wait(self.scoring, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        self.counts.reward_seconds += time.perf_counter() - began
        done = [future for future in self.scoring if future.done()]
        for future in done:
            job, rollout = self.scoring.pop(future)
            self._scored(job, replace(rollout, reward=float(future.result())))
        return bool(done)

    def _scored(self, job: Job, rollout: Rollout) -> None:
        state = self.groups[job.group]
        if job.purified:
            if state.rescue == "moot":
                self._wasted(rollout)
                return
            state.rescues[job.index] = rollout
            state.rescues_scored += 1
        else:
            state.originals[job.index] = rollout
            state.scored.append(rollout.reward)
            self.counts.original_rollouts += 1
            self.counts.original_tokens += len(rollout.response)
            self.counts.originals_seconds = self.engine.clock() - self.start
            self._review(job.group)
        if state.settled():
            self.settled += 1
            for rescue in state.rescues if state.rescue == "certain" else ():
                self.counts.purified_rollouts += 1
                self.counts.purified_tokens += len(rescue.response) if rescue else 0

    # decisions

    def _review(self, g: int) -> None:
        """What Y's rewards so far say about the rescue of a group."""
        state, n, schedule = self.groups[g], self.config.n, self.config.schedule
        complete = len(state.scored) == n
        if state.rescue == "open" and (complete or schedule != "after_group"):
            if self.sampler.rules.certain(state.scored, n):
                state.rescue = "certain"
                self.wanted.extend(state.unsubmitted)
                state.unsubmitted = []
                self.speculating.difference_update(self._rescues_in_flight(g))
            elif self.sampler.rules.moot(state.scored, n):
                self._drop_rescue(g)
            elif complete:
                raise RunError(f"prompt {state.prompt.id}: with all {n} rewards the rescue is neither certain nor moot")
        if complete and state.rescue == "certain":
            done = [rescue for rescue in state.rescues if rescue is not None]
            self.counts.saved_rollouts += len(done)
            self.counts.saved_tokens += sum(len(rescue.response) for rescue in done)
        if state.rescue == "open" and schedule == "speculative" and state.unsubmitted:
            heapq.heappush(self.likely, (-self._chance(g), g, len(state.scored)))

    def _chance(self, g: int) -> float:
        """That the rescue of this group will be wanted, by the prompt's history and the group's own rewards."""
        state, n, certain = self.groups[g], self.config.n, self.sampler.rules.certain
        left = n - len(state.scored)
        needed = 0
        while needed <= left and certain([*state.scored, *[1.0] * needed, *[0.0] * (left - needed)], n):
            needed += 1
        return chance_below(needed, left, *self.sampler.history.belief(state.prompt.id, state.scored))

    def _drop_rescue(self, g: int) -> None:
        state = self.groups[g]
        begun = [job.begun for job in state.unsubmitted]
        state.rescue, state.unsubmitted = "moot", []
        for lost in (*state.rescues, *begun):
            if lost is not None:
                self._wasted(lost)
        self._cancel(self._rescues_in_flight(g))

    def _rescues_in_flight(self, g: int) -> list[str]:
        return [i for i in self.groups[g].rescue_ids if i in self.in_flight]

    def _cancel(self, request_ids: Sequence[str]) -> None:
        fresh = [request_id for request_id in request_ids if request_id not in self.cancelled]
        self.cancelled.update(fresh)
        self.speculating.difference_update(fresh)
        self.engine.abort(fresh)

    def _wasted(self, lost: Rollout | Finished) -> None:
        self.counts.wasted_rollouts += 1
        self.counts.wasted_tokens += len(lost.response if isinstance(lost, Rollout) else lost.tokens)

    def _watch_for_stalls(self, moved: bool) -> None:
        now, patience = self.engine.clock(), self.config.stall_seconds
        if moved:
            self.last_progress = now
        if now - max(self.last_progress, self.last_health_check) < POLL_SECONDS:
            return
        self.last_health_check = now
        health = self.engine.health()
        if not health.ok:
            raise RunError(f"the rollout engine is not well: {health.detail or health}")
        if health.progress != self.progress:
            self.progress, self.last_progress = health.progress, now
        elif now - self.last_progress > patience:
            raise RunError(
                f"generation stalled: nothing for {patience:g} s with {len(self.in_flight)} rollouts in flight and "
                f"{len(self.scoring)} rewards awaited ({health})"
            )
