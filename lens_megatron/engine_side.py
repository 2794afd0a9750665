"""What every rank has to do with the engine: the trainer's weights go there, and on shared GPUs the two take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lens_megatron.config import RunConfig
from lens_megatron.host import Host
from lens_megatron.mcore import runtime
from lens_megatron.mcore.agreement import everywhere
from lens_megatron.mcore.offload import Residence
from lens_megatron.mcore.rendezvous import from_rank_zero
from lens_megatron.mcore.step import Trainable
from lens_megatron.rollout.sglang_supervised import supervised_folder
from lens_megatron.rollout.weight_sync.handover import Handover, ServerMemory
from lens_megatron.rollout.weight_sync.sync import WeightSync
from lens_megatron.rollout.weight_sync.transports import make_transports
from lens_megatron.routed_experts import Routers


class EngineSide:
    """Every rank calls; `host` is rank 0's. `connect` before all but `make_room` and `close`."""

    def __init__(self, config: RunConfig, host: Host | None) -> None:
        self._config, self._host = config, host
        self._memory: ServerMemory | None = None
        self._handover: Handover | None = None
        self._weight_sync: WeightSync | None = None
        self.metrics: dict[str, float] = {}  # of the last sync; rank 0's

    @property
    def _colocated(self) -> bool:
        return self._config.rollout.engine == "sglang" and self._config.placement == "colocated"

    def make_room(self) -> None:
        """Of servers on the same GPUs."""
        if not self._colocated:
            return
        memory = self._memory = ServerMemory(self._config.timeout_s) if self._host is not None else None

        def take() -> None:
            assert memory is not None and self._host is not None
            memory.release(self._host.driver.trainers_turn(), "kv_cache", "weights")

        from_rank_zero(take, "take the servers' memory", self._config.timeout_s)

    def connect(self, policy: Trainable, weights: Path, choose_probe: Callable[[int], list[int]]) -> None:
        config = self._config
        self._policy = policy
        if self._colocated:
            self._handover = Handover(
                Residence(policy),
                lambda work, what: from_rank_zero(work, what, config.timeout_s),
                everywhere,
                None if self._host is None else self._host.driver,
                self._memory,
                config.memory.residual_gib,
            )
        if config.rollout.engine == "sglang":
            self._weight_sync = self._of_servers(weights, choose_probe)

    def _of_servers(self, weights: Path, choose_probe: Callable[[int], list[int]]) -> WeightSync:
        """They get the weights from the ranks, past the rollout driver."""
        settings, run_dir = self._config.rollout.sync, Path(self._config.run_dir)
        return WeightSync(
            settings,
            self._policy,
            make_transports(
                settings, run_dir, weights, runtime.device().type, self._colocated, self._only_disk_is_fast()
            ),
            choose_probe(settings.probe_tokens),
            None if self._host is None else self._host.driver,
            run_dir / "sync",
            self._config.timeout_s,
            self._config.update.tokens_per_microbatch,
            Routers.of(self._policy.spec) if self._config.rollout.routing_replay else None,
        )

    def _only_disk_is_fast(self) -> bool:
        """Servers on the trainer's GPUs, but on other nodes than rank 0, would get their weights in the body of a request; a
        group with the trainer reaches one pipeline stage."""
        staged = int(str(self._config.rollout.server.argument("pp_size") or 1)) > 1
        return staged or (self._colocated and supervised_folder() is not None)

    # on shared GPUs; elsewhere both have their own, all the time

    def trainers_turn(self, keep_engine_weights: bool = False) -> None:
        if self._handover is not None:
            self._handover.to_trainer(keep_engine_weights)

    def engines_turn(self) -> None:
        if self._handover is not None:
            self._handover.to_engine()

    def sync(self, version: int) -> Sequence[str]:
        """What there is to complain of, on rank 0."""
        if self._weight_sync is None:
            self._policy.export_hf_to(
                lambda tensors: self._host.load_weights(tensors, version) if self._host else None,
                "give the engine the weights",
                self._config.timeout_s,
            )
            return ()
        handover = self._handover
        if handover is not None:
            handover.before_sync()
        synced = self._weight_sync.sync(version, handover.to_engine if handover is not None else None)
        if synced is None:
            return ()
        self.metrics = synced.metrics()
        if handover is not None:
            self.metrics["sync/residual_gib"] = handover.residual_gib
        return synced.complaints

    def close(self) -> None:
        if self._weight_sync is not None:
            self._weight_sync.close()
