"""Faults as patches of the code that training runs. Each is a context; `PLANTS` names them.

Nothing of the guards is touched: what a fault leads to is met by the run as it would be in production.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

O_PROJ = "model.layers.0.self_attn.o_proj.weight"  # square in the tiny model: a transposed one has the right shape


def wrapped(where: str, change: Callable[..., Any]) -> Any:
    """`where` replaced by change(original, *arguments)."""
    module, _, name = where.rpartition(".")
    import importlib

    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        parent, _, kind = module.rpartition(".")
        owner = getattr(importlib.import_module(parent), kind)
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def transposed_on_load() -> Any:
    def read(original: Any, mapping: Any, *rest: Any) -> torch.Tensor:
        tensor = original(mapping, *rest)
        return tensor.T.contiguous() if O_PROJ in mapping.hf_names else tensor

    return wrapped("lens_megatron.mcore.hf_bridge.read_shard", read)


def transposed_on_export() -> Any:
    def join(original: Any, mapping: Any, *rest: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in original(mapping, *rest):
            yield name, tensor.T.contiguous() if name == O_PROJ else tensor

    return wrapped("lens_megatron.mcore.hf_bridge.join_shards", join)


@contextmanager
def transposed_both_ways() -> Iterator[None]:
    """What a round trip cannot see."""
    with transposed_on_load(), transposed_on_export():
        yield


def gate_and_up_swapped() -> Any:
    def read(original: Any, mapping: Any, *rest: Any) -> torch.Tensor:
        tensor = original(mapping, *rest)
        return torch.cat(tensor.chunk(2)[::-1]) if mapping.kind == "gate_up" else tensor

    return wrapped("lens_megatron.mcore.hf_bridge.read_shard", read)


def wrong_rope_base() -> Any:
    def build(original: Any, self: Any, spec: Any, *rest: Any, **more: Any) -> None:
        original(self, replace(spec, rope_theta=spec.rope_theta / 100), *rest, **more)

    return wrapped("lens_megatron.mcore.model.TokenModel.__init__", build)


def reference_of_other_weights() -> Any:
    """Damaged on its way to the host, say: after it was loaded rightly."""

    def loaded(original: Any, self: Any, model: Any, who: str, folder: Any) -> None:
        original(self, model, who, folder)
        if who == "reference":
            for chunk in model.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.25)

    return wrapped("lens_megatron.guards.run_guards.RunGuards.after_loading", loaded)


def stale_engine_weights() -> Any:
    """The engine takes every bucket of the second sync and keeps what it had."""

    def load(original: Any, self: Any, bucket: Any) -> None:
        self.syncs = getattr(self, "syncs", 0)
        if self.syncs == 0:
            return original(self, bucket)
        self._loaded.update(bucket)
        return None

    def end(original: Any, self: Any) -> None:
        self.syncs = getattr(self, "syncs", 0) + 1
        original(self)

    stack = ExitStack()
    stack.enter_context(wrapped("lens_megatron.rollout.hf_weights.HFWeights.load", load))
    stack.enter_context(wrapped("lens_megatron.rollout.hf_weights.HFWeights.end", end))
    return stack


def bucket_dropped() -> Any:
    def cut(original: Any, tensors: Any, most_bytes: int = 0) -> Any:
        found = list(original(tensors, 4096))
        yield from found[:1] + found[2:]

    return wrapped("lens_megatron.host.buckets", cut)


def _flip_a_bit(policy: Any) -> None:
    """In one weight of the last rank."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        weight = next(p for p in policy.chunks[0].parameters() if p.dim() == 2).data
        integers = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
        integers[0, 0] ^= 1


def bit_flipped() -> Any:
    """While rollouts are made."""

    def groups(original: Any, self: Any) -> Any:
        _flip_a_bit(self.policy)
        return original(self)

    return wrapped("lens_megatron.trainer.Trainer.training_groups", groups)


def bit_flipped_in_sft() -> Any:
    """After an update."""

    def step(original: Any, policy: Any, *rest: Any) -> Any:
        metrics = original(policy, *rest)
        _flip_a_bit(policy)
        return metrics

    return wrapped("lens_megatron.sft._step", step)


def optimizer_zeroed_at_resume() -> Any:
    def load(original: Any, self: Any, parameter: Any, tensors: Any) -> None:
        original(self, parameter, {k: v if k == "param" else torch.zeros_like(v) for k, v in tensors.items()})

    place = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    return wrapped(f"{place}._set_main_param_and_optimizer_states", load)


def other_data_order() -> Any:
    return wrapped("lens_megatron.data.order.epoch_order", lambda original, *args: original(*args)[::-1])


def masks_inverted() -> Any:
    return wrapped(
        "lens_megatron.update.high_entropy_masks", lambda original, *args: [~mask for mask in original(*args)]
    )


def temperature_forgotten() -> Any:
    def submit(original: Any, self: Any, requests: Any) -> None:
        original(self, [replace(request, temperature=1.0) for request in requests])

    return wrapped("lens_megatron.rollout.embedded.EmbeddedEngine.submit", submit)


def proximal_under_the_wrong_prompt() -> Any:
    def score(original: Any, groups: Any, *rest: Any) -> Any:
        wrong = [[replace(s, roll_tokens=s.prompt_tokens) for s in group] for group in groups]
        return original(wrong, *rest)

    return wrapped("lens_megatron.trainer.evaluate_samples", score)


def loss_not_a_number() -> Any:
    def loss(original: Any, *args: Any) -> Any:
        value, sums = original(*args)
        return value * torch.nan, sums

    return wrapped("lens_megatron.update.policy_loss", loss)


def loss_not_a_number_in_sft() -> Any:
    def make(original: Any, *args: Any) -> Any:
        loss = original(*args)

        def spoilt(*inputs: Any) -> Any:
            value, sums = loss(*inputs)
            return value * torch.nan, sums

        return spoilt

    return wrapped("lens_megatron.sft.supervised_loss", make)


def engine_at_another_version() -> Any:
    def end(original: Any, self: Any) -> None:
        before = self._version
        original(self)
        self._version = max(before, 0)

    return wrapped("lens_megatron.rollout.embedded.EmbeddedEngine.end_update", end)


def nothing() -> Any:
    return ExitStack()


PLANTS: dict[str, Callable[[], Any]] = {
    name: plant
    for name, plant in globals().items()
    if callable(plant) and getattr(plant, "__module__", "") == __name__ and name not in ("wrapped", "_flip_a_bit")
}
