"""HF folders of a run's weights every so many steps: run_dir/hf/step_000020, which other programs open as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from lens_megatron import checkpoints
from lens_megatron.checkpoints import CheckpointConfig
from lens_megatron.errors import RunError
from lens_megatron.mcore.agreement import is_of_transport, one_line
from lens_megatron.mcore.hf_files import write_hf_folder
from lens_megatron.mcore.step import ShardedModel
from lens_megatron.pruning import Pruner, prune_hf


class HfCopies:
    """Weights leave as they do for the engine, tensor by tensor to rank 0. All ranks call, in the same order."""

    def __init__(
        self,
        policy: ShardedModel,
        root: Path,
        config: CheckpointConfig,
        companions_from: Path,
        template: str | None,
        note: Callable[[str], None],
        silence_s: float,
    ) -> None:
        self._policy, self._root, self._config = policy, root, config
        self._companions_from, self._template = companions_from, template
        self._silence_s = silence_s
        self._old = Pruner("HF copies", note)

    def due(self, step: int, last: bool = False) -> bool:
        return self._config.hf_every > 0 and (last or step % self._config.hf_every == 0)

    def write(self, step: int) -> None:
        target = checkpoints.step_folder(self._root, step)

        def take(tensors: Iterator[tuple[str, Tensor]]) -> None:
            try:
                checkpoints.clean_leftovers(self._root)
                write_hf_folder(target, tensors, self._companions_from, replace=True, template=self._template)
            except Exception as failure:
                if is_of_transport(failure):
                    raise
                raise RunError(
                    f"{target}: the HF copy was not written ({one_line(failure)}); free space or set checkpoint.hf_every=0, "
                    "then go on with --resume"
                ) from failure
            if (keep := self._config.hf_keep) is not None:
                self._old.attempt(lambda: prune_hf(self._root, keep, step))

        self._policy.export_hf_to(take, "write the HF copy", self._silence_s, self._config.timeout_s)
