"""What every rank of a run holds, and the verbs that the loop is made of. Rank 0's part is the host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lens_megatron import checkpoints, stacks, stopping
from lens_megatron.config import RunConfig
from lens_megatron.diagnostics import after_update, before_update
from lens_megatron.engine_side import EngineSide
from lens_megatron.guards.run_guards import RunGuards
from lens_megatron.host import Host
from lens_megatron.mcore import runtime
from lens_megatron.mcore.agreement import is_of_transport
from lens_megatron.mcore.checkpoint_run import Saver, resume
from lens_megatron.mcore.hf_copies import HfCopies
from lens_megatron.mcore.rendezvous import from_rank_zero
from lens_megatron.mcore.step import build_frozen, build_trainable
from lens_megatron.mcore.watch import MARGIN_S, Watch
from lens_megatron.model_spec import ModelConfig, check_same_shape, find_weights, load_model_config, named_template
from lens_megatron.precision import torch_dtype
from lens_megatron.progress import Progress, evaluation_line
from lens_megatron.prompt_signals import PromptSignals, Reference
from lens_megatron.purification.strategies import Signals
from lens_megatron.recorder import Recorder
from lens_megatron.reference_scores import identity_of
from lens_megatron.run_folder import RunFolder
from lens_megatron.step_line import EVERY_STEP, check_keep_best
from lens_megatron.stopping import Order
from lens_megatron.types import Prompt, Sample
from lens_megatron.update import Evaluated, evaluate_samples, update_policy

_STEPS_WITHOUT_REWARD = 3  # before a note


class Trainer:
    def __init__(self, config: RunConfig, model: ModelConfig, folder: RunFolder | None) -> None:
        """`folder`: rank 0's. Processes, then models, then the engine's first weights."""
        self.config = config
        check_keep_best(config.checkpoint.keep_best, EVERY_STEP, sure=False)
        weights = find_weights(config.model)
        run_dir = Path(config.run_dir)
        with stacks.of_errors(run_dir, "read the data, meet the other ranks"):
            runtime.check_gpus()  # before the host misses those of its servers
            self.host = Host(config, model, weights, folder) if folder is not None else None
            runtime.initialize(model.spec, config.parallel, config.seed, config.timeout_s + MARGIN_S)
        self.watch = Watch(run_dir, config.timeout_s)
        self.engine = EngineSide(config, self.host)
        self.progress = Progress(config.steps, shown=self.host is not None)
        try:
            with self.watch.reporting():
                self.recorder = Recorder(run_dir / "logs", dist.get_rank())
                with self.starting("start the engine"):
                    self._await_the_driver()
                self._load(model, weights)
        except BaseException:  # whoever asked for a trainer has none to close
            self.close()
            raise

    def _load(self, model: ModelConfig, weights: Path) -> None:
        """Models, and what needs them."""
        config = self.config
        self.step = 0
        dtype = torch_dtype(config.precision)
        self.engine.make_room()  # before any model is built
        with self.starting("load the policy"):
            self.policy = build_trainable(
                model.spec,
                config.parallel,
                weights,
                config.optimizer,
                steps=config.steps,
                memory=config.memory,
                dtype=dtype,
            )
        self.guards = RunGuards(
            config.guards,
            config.rollout.temperature,
            config.update.tokens_per_microbatch,
            config.timeout_s,
            config.rollout.staleness,
            config.rollout.routing_replay,
        )
        self.guards.after_loading(self.policy, "policy", weights)
        self.reference = None
        if config.algorithm.needs_reference:
            source = _reference_weights(config, model, weights)
            with self.starting("load the reference"):
                frozen = build_frozen(model.spec, config.parallel, source, config.memory, dtype)
            self.guards.after_loading(frozen, "reference", source)
            identity = from_rank_zero(  # rank 0's view of the files: on another node their times may differ
                lambda: identity_of(source, *_rounding(config)), "look at the reference", config.timeout_s
            )
            self.reference = Reference(frozen, identity, config.memory.offload_reference)
        self.prompt_signals = PromptSignals(
            self.policy, self.reference, config.algorithm.rescue, config.update.tokens_per_microbatch
        )
        self.engine.connect(self.policy, weights, self._choose_probe)
        self.first_step = 0
        self._last_metrics: dict[str, float] = {}  # of the step that ended last; rank 0's
        self._without_reward = 0  # steps in a row
        if self.host is not None:
            for note in self.host.data_notes:
                self.progress.note(note)
        self._checkpoints = Path(config.run_dir) / "checkpoints"
        template = named_template(config.data.template, model.template)
        self._saver = Saver(self.policy, self._checkpoints, config.checkpoint, weights, template, self._tell)
        self._hf_copies = HfCopies(
            self.policy,
            Path(config.run_dir) / "hf",
            config.checkpoint,
            weights,
            template,
            self._tell,
            config.timeout_s,
        )

    def _tell(self, text: str) -> None:
        self.progress.note(text)  # that of now: resuming makes another

    def _await_the_driver(self) -> None:
        """Before any model is built. Servers may take longer than timeout_s: only now can the other ranks be told to wait."""
        host = self.host
        from_rank_zero(lambda: host.driver.started() if host else None, "start the engine", self.config.timeout_s)

    def _choose_probe(self, tokens: int) -> list[int]:
        probe: list[int] = self.on_rank_zero(lambda host: host.probe_tokens(tokens), "choose a probe")
        return probe

    def on_rank_zero(self, work: Any, what: str, limit_s: float | None = None) -> Any:
        """`work(host)` on rank 0; its result on every rank. `limit_s`: of work that reads or writes files, which may hang
        while rank 0 still shows its sign of life."""

        def limited() -> Any:
            with self.watch.doing(what, limit_s):  # not the ranks' meeting afterwards, which has a limit of its own
                return work(self.host)

        with self.watch.doing(what):
            return from_rank_zero(limited, what, self.config.timeout_s)

    @contextmanager
    def starting(self, what: str) -> Iterator[None]:
        """A part of the start, which may take minutes: on stderr, and as a phase for who looks."""
        self._note(0, what)
        began = time.perf_counter()
        with self.watch.doing(what), self.progress.starting(what):
            yield
        self._note(0, what, time.perf_counter() - began)

    @contextmanager
    def phase(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        """Seconds spent go to time/NAME of this step; who looks for a rank that hangs or died finds it here."""
        self._note(self.step + 1, name)
        with self.watch.doing(name, limit_s), self.progress.phase(name) as timer:
            yield
        self._note(self.step + 1, name, timer.seconds)

    def _note(self, step: int, phase: str, seconds: float | None = None) -> None:
        with self.watch.doing(f"note {phase} in the flight recorder", self.config.timeout_s):
            self.recorder.record(step, phase, seconds)

    # the verbs

    def begin_step(self, step: int) -> None:
        self.step = step
        with self.phase("generate"):  # rollouts made ahead may still be under way
            self.on_rank_zero(lambda host: host.begin_step(step), "begin the step")

    def next_prompts(self) -> list[Prompt]:
        return self.on_rank_zero(lambda host: host.next_prompts(), "choose prompts")

    def score_prompts(self, prompts: Sequence[Prompt]) -> list[Signals]:
        """What the purification strategy goes by, of every prompt of the batch, before anything is generated."""
        if self.prompt_signals.needs_models:
            self.engine.trainers_turn(keep_engine_weights=True)
        return self.prompt_signals.of(prompts, self._watch_first_scores if self._as_loaded() else None)

    def _watch_first_scores(self, policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> None:
        self.guards.first_scores(policy, reference, self.policy)

    def roll_out(self, prompts: Sequence[Prompt], signals: Sequence[Signals]) -> None:
        self.engine.engines_turn()
        self.on_rank_zero(lambda host: host.roll_out(prompts, signals), "generate")

    def start_rollouts_ahead(self, step: int) -> None:
        """The first batch of the next step, scored with the weights that the engine has, before this step changes them."""
        if self.config.rollout.staleness == 0 or step == self.config.steps:
            return
        prompts: list[Prompt] = self.on_rank_zero(lambda host: host.draw_ahead(step), "choose prompts")
        with self.phase("score"):
            signals = self.score_prompts(prompts)
        self.on_rank_zero(lambda host: host.start_ahead(signals), "start generating")

    def await_rollouts_ahead(self) -> None:
        """Unless the new weights are to reach rollouts that are under way."""
        if self.config.rollout.staleness and self.config.rollout.sync.in_flight == "wait":
            self.on_rank_zero(lambda host: host.await_ahead(), "generate")

    def training_groups(self) -> list[list[Sample]]:
        return self.on_rank_zero(lambda host: host.training_groups(), "rebuild groups")

    def evaluate(self, groups: Sequence[list[Sample]]) -> list[list[Evaluated]]:
        staleness = self.config.rollout.staleness
        self.engine.trainers_turn()
        loss, update, temperature = self.config.algorithm.loss, self.config.update, self.config.rollout.temperature
        if self.config.guards.leaves_out:  # what is too far from the engine must be known before the training pass
            update = replace(update, reuse_logprobs=False)
        if not loss.any_kl:
            return evaluate_samples(groups, self.policy, None, loss, update, temperature, staleness)
        assert self.reference is not None
        with self.reference.at_hand() as reference:
            return evaluate_samples(groups, self.policy, reference, loss, update, temperature, staleness)

    def update(self, groups: Sequence[list[Evaluated]]) -> dict[str, float]:
        update = self.config.update
        groups, noticed = self.guards.before_update(
            self.step,
            groups,
            self.policy,
            self.reference.model if self.reference is not None else None,
            same_weights=self._as_loaded(),
            engine_stands_in=update.old_logprobs == "engine",
        )
        metrics = self._update(groups)
        once = update.minibatches == update.epochs == 1
        self.guards.after_update(metrics, self.policy, before_any=once and self._as_loaded())
        return {**metrics, **noticed}

    def _as_loaded(self) -> bool:
        """Before the first update of a run whose reference is its initial policy."""
        return self.step == 0 and self.config.reference is None

    def _update(self, groups: Sequence[list[Evaluated]]) -> dict[str, float]:
        loss, update, temperature = self.config.algorithm.loss, self.config.update, self.config.rollout.temperature
        if not self.config.diagnostics.due(self.step + 1):
            return update_policy(self.policy, groups, loss, update, temperature)
        before = before_update(self.policy, groups, loss, update, temperature)
        metrics = update_policy(self.policy, groups, loss, update, temperature)
        return {**metrics, **before, **after_update(self.policy, groups, update, temperature)}

    def sync_weights(self, version: int) -> None:
        """Every rank exports what it holds; the engine has the whole model, or the run ends."""
        for complaint in self.engine.sync(version):
            self.progress.note(f"weight sync {version}: {complaint}")

    def benchmark(self, step: int) -> dict[str, float]:
        """`eval/...` of the weights that the engine has, when an evaluation is due after this step."""
        if not self.config.evaluation.due(step, last=self.config.steps):
            return {}
        with self.phase("eval"):
            self.engine.engines_turn()
            self.on_rank_zero(lambda host: host.await_ahead(), "generate")  # the engine does one thing at a time
            metrics = self.on_rank_zero(lambda host: host.benchmark(step), "evaluate")
            limit_s = self.config.timeout_s
            self.on_rank_zero(lambda host: host.keep_answers(step), "write the evaluation's answers", limit_s)
        self.progress.note(evaluation_line(step, metrics))
        return metrics

    def benchmark_first_policy(self) -> None:
        """What training started from: a line for step 0, which has no other measurements."""
        if self.first_step > 0:
            return
        metrics = self.benchmark(0)
        if self.host is not None and metrics:
            line = {**EVERY_STEP, "step": 0, **metrics, **self.progress.times()}
            with self.watch.doing("write the first evaluation's metrics", self.config.timeout_s):
                self.host.folder.append_metrics(line)
                for complaint in self.host.trackers.log(line):
                    self.progress.note(complaint)
        self.progress.begin_step()

    def told_to_end(self) -> Order | None:
        """By signal or file; rank 0 looks, all ranks leave after the same step. The last step is an end anyway."""
        if self.step + 1 == self.config.steps:
            return None
        limit_s = self.config.timeout_s
        return self.on_rank_zero(lambda host: stopping.order(host.folder.path), "look for an order to end", limit_s)

    def save(self, step: int, last: bool = False) -> None:
        """When one is due; written in the background. The engine's weights are not in it: they are synced at resume."""
        at_end = step == self.config.steps
        copy, save = self._hf_copies.due(step, at_end), self._saver.due(step, last or at_end)
        if copy or save:  # before the limit: it may wait for a server that is being started
            self.engine.trainers_turn(keep_engine_weights=True)
        with self.watch.doing("save", self.config.checkpoint.timeout_s + MARGIN_S):
            self._save(step, copy, save)

    def _save(self, step: int, copy: bool, save: bool) -> None:
        if copy:
            self._hf_copies.write(step)
        if save:
            self.on_rank_zero(lambda host: host.await_ahead(), "generate")  # the batch in flight is part of it
            state = {} if self.host is None else self.host.state_dict()
            state["guards"] = self.guards.state(self.policy)
            # rank 0's metrics: it alone writes the manifest, and chooses what to keep by it
            state["noise_floor"] = self.prompt_signals.noise_floor
            if self.reference is not None:
                state["reference_scores"] = self.reference.scores.state_dict()
            self._saver.finish()  # the one before, which has a limit of its own
            later, writing_s = self.config.checkpoint.asynchronous, self.config.checkpoint.timeout_s
            with self.watch.doing("begin the checkpoint", self.config.timeout_s if later else writing_s):
                self._saver.save(step, state, self._last_metrics)
        self._saver.poll()

    @property
    def nothing_left(self) -> bool:
        """Every step that is asked for has been made, by the run that was resumed."""
        return self.first_step >= self.config.steps

    def resume(self) -> None:
        """From the newest whole checkpoint; from the start when there is none yet."""
        with self.starting("load the checkpoint"):
            found = resume(self.policy, self._checkpoints)
        same_reference = True
        if found is not None:
            self.first_step = found.step
            if found.same_rounding:  # else it rounds in other places: the floor is measured before its first scores
                self.prompt_signals.noise_floor = found.extra["noise_floor"]
            if self.reference is not None and "reference_scores" in found.extra:
                same_reference = self.reference.scores.load_state_dict(found.extra["reference_scores"])
            if found.manifest.optimizer:  # else only the weights were loaded
                self.guards.after_resume(self.policy, found.folder, found.extra.get("guards", {}), found.manifest.dtype)
        self.progress = Progress(self.config.steps, self.first_step, shown=self.host is not None)

        def take_up(host: Host) -> None:
            if found is not None:
                host.load_state_dict(found.extra)  # first: what does not fit is refused, and the folder as it was
            if not self.nothing_left:
                host.folder.rewind(self.first_step if found is not None else -1)  # step 0 is evaluated again as well
            if found is not None:
                for reason in found.passed_over:
                    self.progress.note(f"passed over a damaged checkpoint: {reason}")
                for folder in found.unreadable:
                    self.progress.note(f"{folder.name} is now {checkpoints.set_aside(folder).name}")
                if found.same_rounding and not same_reference:
                    self.progress.note(
                        "the reference's files are not those that this run was saved with: see that it is the same model"
                    )
                left = ", the last: nothing is left to do, and the run's files stay" if self.nothing_left else ""
                self.progress.note(f"resuming after step {self.first_step}{left}")
            else:
                self.progress.note(f"{host.folder.path}: no checkpoint to resume from: starting with step 1")

        # a state that does not fit (other data, another filter) is an error of all ranks, not of rank 0 alone
        self.on_rank_zero(take_up, "take up the run", self.config.timeout_s)

    def finish(self) -> None:
        """The last checkpoint is whole before the run ends."""
        with self.watch.doing("finish the last checkpoint", self.config.checkpoint.timeout_s + MARGIN_S):
            self._saver.finish()

    @contextmanager
    def rescuing(self) -> Iterator[None]:
        """Around the loop: a checkpoint that is being written in the background when a later step fails is not lost. Before
        the other ranks hear of the error, as those who hear of one leave soon."""
        try:
            yield
        except Exception as error:
            if not is_of_transport(error):
                with self.watch.doing("complete the checkpoint under way", self._saver.rescue_limit_s):
                    self._saver.rescue()
            raise

    def finish_step(self, groups: Sequence[list[Evaluated]], metrics: dict[str, float]) -> None:
        if self.host is None:
            return
        with self.watch.doing("write the step's files", self.config.timeout_s):
            tree: dict[str, float | None] = {
                **EVERY_STEP,
                "step": self.step + 1,
                **self.host.step_metrics(),
                **self.engine.metrics,
                **metrics,
            }
            if (floor := self.prompt_signals.noise_floor) is not None:
                tree["noise_floor"] = floor
            if self.reference is not None and (known := self.reference.scores.counted()) is not None:
                tree["purification/reference_known"] = known
            self.host.folder.write_rollouts(self.step + 1, list(self.host.rollout_rows(groups)))
            tree.update(self.progress.times())
            self.guards.add("engine_weights", self.host.check_seconds)
            self.host.check_seconds = 0.0
            tree.update(self.guards.times())
            self.host.folder.append_metrics(tree)
            for complaint in self.host.trackers.log(tree):
                self.progress.note(complaint)
            self._last_metrics = {name: value for name, value in tree.items() if value is not None}
            self.progress.finish_step(self._last_metrics)
            self._note_steps_without_reward(self._last_metrics)
            check_keep_best(self.config.checkpoint.keep_best, [*tree, *self.host.benchmark_names])

    def _note_steps_without_reward(self, metrics: Mapping[str, float]) -> None:
        self._without_reward = self._without_reward + 1 if metrics.get("reward") == 0.0 else 0
        if self._without_reward == _STEPS_WITHOUT_REWARD:
            self.progress.note(
                f"every reward of the last {self._without_reward} steps was 0, and nothing is learnt from that: are answers "
                "given in the form that the rule (rewards) reads? The report shows them beside the golden ones"
            )

    def close(self) -> None:
        self.engine.close()
        if self.host is not None:
            self.host.close()
        self.watch.close()
        runtime.shutdown()


def _rounding(config: RunConfig) -> tuple[object, ...]:
    """What the last bits of a score depend on, besides the weights."""
    return torch_dtype(config.precision), runtime.device().type, config.parallel


def _reference_weights(config: RunConfig, model: ModelConfig, policy: Path) -> Path:
    if config.reference is None:
        return policy
    check_same_shape(config.reference, load_model_config(config.reference).spec, config.model, model.spec)
    return find_weights(config.reference)
