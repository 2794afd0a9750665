"""HF folders of a run's weights every so many steps: run_dir/hf/step_000020, which other programs open as it is."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from lens_megatron import checkpoints
from lens_megatron.checkpoints import CheckpointConfig
from lens_megatron.errors import RunError
from lens_megatron.mcore.agreement import on_rank_0, one_line
from lens_megatron.mcore.hf_files import write_hf_folder
from lens_megatron.mcore.step import ShardedModel


class HfCopies:
    """Weights leave as they do for the engine, tensor by tensor to rank 0. All ranks call, in the same order."""

    def __init__(
        self,
        policy: ShardedModel,
        root: Path,
        config: CheckpointConfig,
        companions_from: Path,
        template: str | None = None,
    ) -> None:
        self._policy, self._root, self._config = policy, root, config
        self._companions_from, self._template = companions_from, template

    def due(self, step: int, last: bool = False) -> bool:
        return self._config.hf_every > 0 and (last or step % self._config.hf_every == 0)

    def write(self, step: int) -> None:
        target = checkpoints.step_folder(self._root, step)
        tensors = self._policy.export_hf()
        error = ""
        if dist.get_rank() == 0:
            try:
                checkpoints.clean_leftovers(self._root)
                write_hf_folder(target, tensors, self._companions_from, replace=True, template=self._template)
            except Exception as failure:  # the other ranks are sending: it is raised where all can hear it
                error = one_line(failure)
        for _ in tensors:  # what is left; on the other ranks, everything
            pass

        def complete() -> None:
            if error:
                raise RunError(
                    f"{target}: the HF copy was not written ({error}); free space or set checkpoint.hf_every=0, "
                    "then go on with --resume"
                )
            if self._config.hf_keep is not None:
                checkpoints.prune_hf(self._root, self._config.hf_keep, step)

        on_rank_0(complete)
