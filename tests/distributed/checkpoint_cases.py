"""What runs on every rank of the checkpoint tests. A kill test starts this file as processes of its own."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lens_megatron.errors import RunError, UsageError
from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import cases, reference
from tests.tiny_models import random_sequences

SEQUENCES = random_sequences(5)
DATA = reference.loss_data(SEQUENCES)
EXTRA = {"position": [3, 1], "reference cache": {"sha256:1": 0.25}, "text": "é\n"}


@dataclass(frozen=True)
class Answer:
    weights: dict[str, Tensor]  # HF names; empty but on rank 0
    extra: Any = None
    random: Any = None
    rates: tuple[float, ...] = ()


def saved_and_loaded_in_buckets(folder: Path, layout: ParallelConfig, target: Path) -> tuple[int, Any, Any]:
    """With gradients summed while backward runs, as on a GPU, and buffers therefore in several buckets: how many elements
    fill them up, and the checksums before and after."""
    import pytest

    from lens_megatron.mcore import checkpoint, optimizer
    from lens_megatron.mcore.checksums import state_checksums

    config = optimizer.DistributedDataParallelConfig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "can_overlap", lambda: True)
        patch.setattr(
            optimizer, "DistributedDataParallelConfig", lambda **settings: config(**settings, bucket_size=3000)
        )
        trained = policy(folder, layout)
        train(trained, 2)
        before = state_checksums(trained)
        checkpoint.save(trained, target, EXTRA, step=2, companions_from=folder)
        fresh = policy(folder, layout)
        checkpoint.load(fresh, target)
    chunk = trained.chunks[0]
    buckets = [bucket for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers) for bucket in buffer.buckets[:-1]]
    filled = sum(bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets)
    return filled, before, state_checksums(fresh)


def warnings_of_a_save(folder: Path, layout: ParallelConfig, target: Path) -> list[str]:
    """What Megatron-Core has to say on this rank."""
    import logging

    from lens_megatron.mcore import checkpoint

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    heard, logger = Heard(logging.WARNING), logging.getLogger("megatron.core.dist_checkpointing")
    trained = policy(folder, layout)
    train(trained, 1)
    logger.addHandler(heard)
    try:
        checkpoint.save(trained, target, EXTRA, step=1, companions_from=folder)
    finally:
        logger.removeHandler(heard)
    return said


def policy(folder: Path, layout: ParallelConfig, dtype: torch.dtype | None = None, on_host: float = 0.0) -> Any:
    """`on_host`: share of Adam's moments."""
    from lens_megatron.mcore.settings import MemoryConfig, OptimizerConfig
    from lens_megatron.mcore.step import build_trainable

    spec = cases.start(folder, layout)
    # every step has another rate, so that a schedule that is not restored is noticed
    settings = OptimizerConfig(
        lr=reference.LR, eps=reference.EPS, clip_grad=reference.CLIP, weight_decay=reference.DECAY,
        warmup_steps=1, schedule="linear", decay_steps=9,
    )  # fmt: skip
    memory = MemoryConfig(offload_optimizer=on_host)
    return build_trainable(spec, layout, folder, settings, steps=9, dtype=dtype, memory=memory)


def train(trainable: Any, steps: int) -> tuple[float, ...]:
    from lens_megatron.mcore.step import train_step

    loss = cases._loss(SEQUENCES, DATA)
    return tuple(train_step(trainable, SEQUENCES, loss, tokens_per_microbatch=64).learning_rate for _ in range(steps))


def exported(trainable: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainable.export_hf()}


def scramble(seed: int) -> None:
    """All generators elsewhere: workers live on between tests, and would still be where the saving one left them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    torch.manual_seed(seed)
    tracker.set_states({name: torch.get_rng_state() for name in tracker.get_states()})
    torch.rand(seed)


def uninterrupted(folder: Path, layout: ParallelConfig, target: Path | None, on_host: float = 0.0) -> Answer:
    """4 steps; saves after 2 when there is a `target`."""
    from lens_megatron.mcore import checkpoint, checkpoint_optimizer

    trainable = policy(folder, layout, on_host=on_host)
    rates = train(trainable, 2)
    state = None
    if target is not None:
        scramble(1000 + dist.get_rank())
        state = checkpoint_optimizer.random_states()
        checkpoint.save(trainable, target, EXTRA, step=2, companions_from=folder)
    rates += train(trainable, 2)
    return Answer(exported(trainable), random=state, rates=rates)


def resumed(folder: Path, layout: ParallelConfig, source: Path, spoil: str = "", on_host: float = 0.0) -> Answer:
    """2 more steps in fresh objects. `spoil`: what is set wrong on purpose after loading."""
    from lens_megatron.mcore import checkpoint, checkpoint_optimizer

    trainable = policy(folder, layout, on_host=on_host)
    scramble(7)
    extra = checkpoint.load(trainable, source)
    state = checkpoint_optimizer.random_states()
    if spoil:
        _spoil(trainable.optimizer, spoil)
    rates = train(trainable, 2)
    return Answer(exported(trainable), extra, state, rates)


def resumed_with_states_of_the_engine(folder: Path, layout: ParallelConfig, source: Path) -> Answer:
    """As with Transformer Engine, whose norms ask a checkpoint for a state, empty without FP8, that plain ones never wrote."""
    from lens_megatron.mcore.norm import PlainRMSNorm

    PlainRMSNorm.get_extra_state = lambda self: torch.Tensor()  # type: ignore[method-assign,misc,assignment]
    PlainRMSNorm.set_extra_state = lambda self, state: None  # type: ignore[method-assign,misc,assignment]
    try:
        return resumed(folder, layout, source)
    finally:
        del PlainRMSNorm.get_extra_state, PlainRMSNorm.set_extra_state


@torch.no_grad()
def _spoil(optimizer: Any, what: str) -> None:
    for part in _parts(optimizer):
        states = list(part.optimizer.state.values())
        if what == "shared step":
            for state in states:
                state["step"] = states[0]["step"]
        elif what == "schedule":
            optimizer.scheduler.num_steps = 0
        elif states:
            largest = max(states, key=lambda state: state[what].numel())
            largest[what].zero_()


def _parts(optimizer: Any) -> Any:
    from lens_megatron.mcore.optimizer import optimizer_parts

    return optimizer_parts(optimizer.inner)


def moments(folder: Path, layout: ParallelConfig, source: Path) -> tuple[list[int], float]:
    """How often each step tensor occurs, its value, right after loading."""
    from lens_megatron.mcore import checkpoint

    trainable = policy(folder, layout)
    checkpoint.load(trainable, source)
    steps = [s["step"] for part in _parts(trainable.optimizer) for s in part.optimizer.state.values()]
    return [len(steps), len({id(step) for step in steps})], max((float(step) for step in steps), default=2.0)


def save_while_training(folder: Path, layout: ParallelConfig, root: Path) -> tuple[Answer, bool, list[bool], bool]:
    """The writers are held back until two more steps have changed every weight."""
    from lens_megatron.mcore import checkpoint, checkpoint_writer

    trainable = policy(folder, layout)
    train(trainable, 2)
    before = exported(trainable)
    go = threading.Event()
    write = checkpoint_writer.Staged.write

    def held_back(staged: Any) -> Any:
        assert go.wait(60)
        return write(staged)

    checkpoint_writer.Staged.write = held_back  # type: ignore[method-assign]
    try:
        pending = checkpoint.save(trainable, root / "step_000002", EXTRA, asynchronous=True, step=2)
        early = [pending.done(), pending.wait(timeout_s=0.01)]
        train(trainable, 2)
        early.append(pending.done())
        visible = (root / "step_000002").exists()
        if dist.get_rank() == 0:  # ranks finish at different times: nothing may show until the last has
            go.set()
            assert pending._thread is not None
            pending._thread.join(60)
        early.append(pending.done())
        visible |= (root / "step_000002").exists()
        go.set()
        finished = pending.wait(timeout_s=60) and pending.done()
    finally:
        checkpoint_writer.Staged.write = write  # type: ignore[method-assign]
    return Answer(before), finished, early, visible


def weights_of(
    folder: Path, layout: ParallelConfig, source: Path, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    from lens_megatron.mcore import checkpoint

    trainable = policy(folder, layout, dtype)
    checkpoint.load(trainable, source)
    return exported(trainable)


def disk_full(folder: Path, layout: ParallelConfig, target: Path, file: str, asynchronous: bool) -> str:
    """The error of a save in which writing `file` meets the kernel's own full disk; training goes on after it."""
    from lens_megatron.mcore import checkpoint

    trainable = policy(folder, layout)
    train(trainable, 1)
    stage = checkpoint.stage

    def stage_then_fill_disk(*arguments: Any, **options: Any) -> Any:
        staged = stage(*arguments, **options)
        if dist.get_rank() == 0:
            (staged.folder / file).symlink_to("/dev/full")
        dist.barrier()
        return staged

    checkpoint.stage = stage_then_fill_disk
    try:
        checkpoint.save(trainable, target, EXTRA, asynchronous, step=2).wait()
    except RunError as error:
        train(trainable, 1)
        return str(error)
    finally:
        checkpoint.stage = stage
    return ""


def save_steps(folder: Path, layout: ParallelConfig, root: Path, steps: int, config: Any) -> dict[str, Tensor]:
    """A run of that many steps that saves after each; the weights after the last."""
    from lens_megatron.mcore.checkpoint_run import Saver

    trainable = policy(folder, layout)
    saver = Saver(trainable, root, config, companions_from=folder)
    for step in range(1, steps + 1):
        train(trainable, 1)
        saver.poll()
        saver.save(step, {"step": step}, {"success": 1 / (1 + abs(step - 2))})
    saver.finish()
    return exported(trainable)


def resume(folder: Path, layout: ParallelConfig, root: Path) -> Any:
    from lens_megatron.mcore.checkpoint_run import resume as resume_run

    trainable = policy(folder, layout)
    try:
        found = resume_run(trainable, root)
    except (RunError, UsageError) as error:
        return type(error).__name__, str(error)
    if found is None:
        return None
    return found.step, found.extra, found.folder.name, found.passed_over, found.unreadable


def rescued(root: Path, how: str) -> tuple[bool, list[str], float]:
    """A step fails while both ranks' writers are held back. Whether the checkpoint shows right afterwards, what was said, and
    how long it took."""
    import time

    from lens_megatron.checkpoints import CheckpointConfig, Manifest, begin
    from lens_megatron.mcore import checkpoint, checkpoint_run
    from lens_megatron.mcore.checkpoint_writer import Written

    rank, target = dist.get_rank(), root / "step_000004"
    if rank == 0:
        begin(target)
    dist.barrier()
    go = threading.Event()

    class Part:
        folder = target.with_name("step_000004.partial")

        def write(self) -> Written:
            go.wait(60.0)
            if how == "a writer fails" and rank == 1:
                raise OSError(28, "No space left on device")
            (self.folder / f"{rank}.distcp").write_bytes(b"part")
            return Written([rank], {f"{rank}.distcp": 4})

        def write_index(self, results: Any) -> None:
            assert results == [[0], [1]]
            (self.folder / ".metadata").write_bytes(b"index")

    def manifest(sizes: dict[str, int]) -> Manifest:
        return Manifest(4, {}, {}, 2, "float32", True, sizes)

    said: list[str] = []
    config = CheckpointConfig(timeout_s=0.6 if how == "a writer hangs" else 60.0)
    saver = checkpoint_run.Saver(None, root, config, note=said.append)  # type: ignore[arg-type]
    saver._pending = checkpoint.PendingSave(target, Part(), manifest)  # type: ignore[arg-type]
    meeting, checkpoint._MEETING_S = checkpoint._MEETING_S, 0.5
    began = time.monotonic()
    try:
        if how != "a writer hangs" or rank == 0:
            threading.Timer(1.0, go.set).start()
        if how != "one rank fails" or rank == 1:
            saver.rescue()
        return target.is_dir(), said, time.monotonic() - began
    finally:
        checkpoint._MEETING_S = meeting
        dist.barrier()
        go.set()


def resume_meeting(
    error: BaseException, times: int, folder: Path, layout: ParallelConfig, root: Path, rank: int, file: str, read: bool
) -> Any:
    """`resume` where opening `file` (a pattern) of step 4, or the first read of it, fails so often on that rank."""
    from lens_megatron.mcore import checkpoint_run

    left = times if dist.get_rank() == rank else 0
    opened = Path.open

    class Failing(io.FileIO):
        def readinto(self, *_: Any) -> int:
            raise error

        read = readinto  # type: ignore[assignment]

    def failing(self: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        if self.parent.name != "step_000004" or not self.match(file) or left == 0:
            return opened(self, *arguments, **options)
        left -= 1
        if read:
            return Failing(self)
        if isinstance(error, OSError):
            error.filename = str(self)
        raise error

    pauses, checkpoint_run._PAUSES_S = checkpoint_run._PAUSES_S, (0.01, 0.01)
    Path.open = failing  # type: ignore[method-assign]
    try:
        answer = resume(folder, layout, root)
    except SystemExit as ended:
        answer = "SystemExit", ended.code
    finally:
        Path.open = opened  # type: ignore[method-assign]
        checkpoint_run._PAUSES_S = pauses
    if dist.get_rank() == rank:
        assert left == 0 or times > 3  # else nothing was tested
    return answer


def refusal(folder: Path, layout: ParallelConfig, source: Path) -> str:
    """Every rank's error on loading; "" when it loads."""
    from lens_megatron.mcore import checkpoint

    trainable = policy(folder, layout)
    try:
        checkpoint.load(trainable, source)
    except (RunError, UsageError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def hf_copy(
    folder: Path, layout: ParallelConfig, root: Path, steps: int = 3, stuck: str = "", pause_s: float = 0.0
) -> tuple[str, list[str]]:
    """Every rank's error on writing HF copies of `steps` steps, of which 2 stay, and notes; "" when they are written.
    `stuck`: a copy that cannot be removed. `pause_s`: before the first tensor is taken, and after the last."""
    from lens_megatron import checkpoints, pruning
    from lens_megatron.mcore import hf_copies

    def slowly(target: Path, tensors: Iterator[tuple[str, Tensor]], *arguments: Any, **keywords: Any) -> None:
        def pausing() -> Iterator[tuple[str, Tensor]]:
            time.sleep(pause_s)
            yield from tensors
            time.sleep(pause_s)

        write_hf_folder(target, pausing(), *arguments, **keywords)

    def but_one(folder: Path) -> None:
        if folder.name == stuck:
            raise PermissionError(13, "Permission denied", str(folder))
        remove(folder)

    notes: list[str] = []
    config = checkpoints.CheckpointConfig(hf_every=1, hf_keep=2)
    copies = hf_copies.HfCopies(policy(folder, layout), root, config, folder, None, notes.append, 60.0)
    write_hf_folder, remove = hf_copies.write_hf_folder, pruning.remove
    hf_copies.write_hf_folder, pruning.remove = slowly, but_one
    try:
        for step in range(1, steps + 1):
            copies.write(step)
    except RunError as error:
        return str(error), notes
    finally:
        hf_copies.write_hf_folder, pruning.remove = write_hf_folder, remove
    return "", notes


def two_dtypes(folder: Path, layout: ParallelConfig, source: Path) -> list[dict[str, Tensor]]:
    """bf16: at the save; after 2 more steps; after loading and 2 more steps."""
    from lens_megatron.mcore import checkpoint

    straight = policy(folder, layout, torch.bfloat16)
    train(straight, 2)
    checkpoint.save(straight, source, EXTRA, step=2)
    weights = [exported(straight)]
    train(straight, 2)
    again = policy(folder, layout, torch.bfloat16)
    checkpoint.load(again, source)
    train(again, 2)
    return [*weights, exported(straight), exported(again)]


def weights_only(folder: Path, layout: ParallelConfig, source: Path) -> list[dict[str, Tensor]]:
    """Saved without optimizer: what was saved; loaded into a model that only scores; and into policies in two ways."""
    from lens_megatron.mcore import checkpoint
    from lens_megatron.mcore.step import build_frozen

    trainable = policy(folder, layout, torch.bfloat16)
    train(trainable, 2)
    checkpoint.save(trainable, source, EXTRA, step=2, with_optimizer=False)
    frozen = build_frozen(trainable.spec, layout, folder, dtype=torch.bfloat16)
    checkpoint.load_weights(frozen, source)
    answers = [exported(trainable), dict(frozen.export_hf())]
    for load in (checkpoint.load, checkpoint.load_weights):
        again = policy(folder, layout, torch.bfloat16)
        load(again, source)
        assert again.optimizer.scheduler.num_steps == (2 if load is checkpoint.load else 0)
        # a master weight that kept the HF folder's value would come back with the next update
        for part in _parts(again.optimizer):
            part._copy_main_params_to_model_params()
        for chunk in again.chunks:
            chunk.start_param_sync(force_sync=True)
        answers.append(exported(again))
    return answers


def staged_copy(folder: Path, target: Path, copy: bool) -> Tensor:
    """What is written of a tensor that fills its storage and changes between staging and writing."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from lens_megatron.mcore.checkpoint_writer import stage
    from lens_megatron.mcore.runtime import cuda_literals

    cases.start(folder, ParallelConfig())
    live = torch.ones(3)
    with cuda_literals():
        state = {"weight": ShardedTensor.from_rank_offsets("weight", live)}
        staged = stage(state, target, {live.untyped_storage().data_ptr()}, {}, copy=copy)
        live.zero_()
        staged.write_index([staged.write().results])
        (target / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.empty(3))}
        return dist_checkpointing.load(wanted, str(target))["weight"].clone()


def failing_twice(folder: Path, target: Path) -> list[str]:
    """Every call after a failed save says so again, and the writer's own error reaches ranks that wrote well."""
    from lens_megatron.mcore import checkpoint

    trainable = policy(folder, ParallelConfig())
    stage = checkpoint.stage

    def stage_then_break(*arguments: Any, **options: Any) -> Any:
        staged = stage(*arguments, **options)
        if dist.get_rank() == 1:
            staged.more["other.bin"] = lambda: 1 / 0  # type: ignore[assignment,return-value]
        return staged

    checkpoint.stage = stage_then_break
    errors = []
    try:
        pending = checkpoint.save(trainable, target, EXTRA, asynchronous=True, step=2)
        for call in (pending.wait, pending.done):
            try:
                call()
            except RunError as error:
                errors.append(str(error))
    finally:
        checkpoint.stage = stage
    return errors


def error_of_rank_0(folder: Path) -> list[str]:
    """A part of the state that nobody saves, found by rank 0 alone; and a loop state that is no JSON."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from lens_megatron.mcore import checkpoint
    from lens_megatron.mcore.checkpoint_writer import stage
    from lens_megatron.mcore.runtime import cuda_literals

    trainable = policy(folder, ParallelConfig())
    errors = []
    try:
        with cuda_literals():
            holes = {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(3), (0, 0, 2))}
            stage(holes, folder, set(), {}, copy=False)
    except RunError as error:
        errors.append(str(error))
    try:
        checkpoint.save(trainable, folder / "never", {"position": {1, 2}}, step=1)
    except RunError as error:
        errors.append(str(error))
    return errors


if __name__ == "__main__":  # one rank of a run that saves for ever, to be killed
    import os

    from lens_megatron.mcore import checkpoint as _checkpoint

    _folder, _root = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[3], int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    _trainable = policy(_folder, ParallelConfig())
    _step: int = 0
    while True:
        _step += 1
        train(_trainable, 1)
        _checkpoint.save(_trainable, _root / f"step_{_step:06d}", {"step": _step}, step=_step)
        print(_step, flush=True)
