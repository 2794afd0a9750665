"""Samplers, made in the rollout driver's own process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_megatron.algorithms.rescue import RescueConfig, rescue_is_certain, rescue_is_moot
from lens_megatron.errors import UsageError
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.judgement import Judgement
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import RescueRules, SamplingConfig
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.routed_experts import Routers
from lens_megatron.types import Prompt, Rollout

if TYPE_CHECKING:
    from lens_megatron.rollout.sglang_pool import Resync


# of a GPU, for the server's weights and cache: a trainer that has left still holds up to memory.residual_gib, CUDA's context
# and NCCL's buffers, which SGLang, measuring before it came, would count as its own
COLOCATED_FRACTION = 0.75


class TextReward:
    """Decodes a response and has it judged by the pool."""

    def __init__(self, tokenizer: Any, config: RewardConfig, stall_seconds: float) -> None:
        from lens_megatron.rewards.pool import RewardPool

        self._tokenizer = tokenizer
        self._pool = RewardPool(config, stall_seconds)

    def judge(self, prompt: Prompt, response: tuple[int, ...], finish: str) -> tuple[str, Future[Judgement]]:
        text = self._tokenizer.decode(response, skip_special_tokens=True)
        return text, self.judge_text(prompt, text, finish)

    def judge_text(self, prompt: Prompt, response: str, finish: str) -> Future[Judgement]:
        return self._pool.submit(prompt.id, prompt.source, prompt.answer, response, cut=finish == "length")

    def __call__(self, prompt: Prompt, rollout: Rollout) -> Future[float]:
        reward: Future[float] = Future()

        def judged(judgement: Future[Judgement]) -> None:
            if (error := judgement.exception()) is not None:
                reward.set_exception(error)
            elif reward.set_running_or_notify_cancel():
                reward.set_result(judgement.result().reward)

        self.judge(prompt, rollout.response, rollout.finish)[1].add_done_callback(judged)
        return reward

    def health(self) -> Mapping[str, float]:
        return self._pool.health()

    def close(self) -> None:
        self._pool.close()


def rescue_rules(config: RescueConfig) -> RescueRules:
    return RescueRules(
        certain=partial(_certain, config=config),
        moot=partial(_moot, config=config),
    )


def _certain(rewards: Any, n: int, config: RescueConfig) -> bool:
    return rescue_is_certain(rewards, n, config)


def _moot(rewards: Any, n: int, config: RescueConfig) -> bool:
    return rescue_is_moot(rewards, n, config)


def embedded_sampler(
    folder: Path,
    slots: int,
    device: str,
    dtype: str,
    sampling: SamplingConfig,
    rescue: RescueConfig,
    rewards: RewardConfig,
    seed: int,
) -> Sampler:
    """The HF model in this process, without weights until the first sync."""
    from transformers import AutoConfig

    from lens_megatron.data.tokenizer import load_tokenizer, stop_tokens
    from lens_megatron.rollout.embedded import EmbeddedEngine

    tokenizer = load_tokenizer(str(folder))
    engine = EmbeddedEngine.from_config(AutoConfig.from_pretrained(str(folder)), slots, device, dtype)
    reward = TextReward(tokenizer, rewards, sampling.stall_seconds)
    return Sampler(engine, reward, rescue_rules(rescue), sampling, stop_tokens(tokenizer), seed)


def sglang_sampler(
    folder: Path,
    slots: int,  # the servers know their own
    device: str,
    dtype: str,
    sampling: SamplingConfig,
    rescue: RescueConfig,
    rewards: RewardConfig,
    seed: int,
    *,
    servers: int,
    server: ServerConfig,
    logs: Path,
    first_gpu: int,
    colocated: bool,
    in_place: bool,
    resync: Resync | None = None,
) -> Sampler:
    """SGLang's servers, started or found, without weights of the run until the first sync. `in_place`: they are to take
    weights with rollouts under way. `resync` brings a server back that was started again while it generated (see
    SGLangEngine)."""
    from lens_megatron.data.tokenizer import load_tokenizer, stop_tokens
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.rollout.sglang_engine import SGLangEngine
    from lens_megatron.rollout.sglang_schema import IN_PLACE_ARGUMENTS, stale_in_place, untold_experts
    from lens_megatron.rollout.sglang_seat import seats

    tokenizer = load_tokenizer(str(folder))
    # token ids in, token ids out; a server that shares its GPUs with the trainer must be able to let go of its memory
    common: dict[str, Any] = {"dtype": dtype, "skip_tokenizer_init": True}
    common |= {"enable_memory_saver": True, "mem_fraction_static": COLOCATED_FRACTION} if colocated else {}
    common |= {"enable_return_routed_experts": True} if sampling.routing_replay else {}
    common |= IN_PLACE_ARGUMENTS if in_place else {}
    found = seats(server, servers, str(folder), logs, first_gpu, common, seed, take_over=True)
    where = "" if server.urls else f"; logs in {logs}"
    print(f"waiting for {len(found)} SGLang server{'s' * (len(found) > 1)}{where}", file=sys.stderr, flush=True)
    began = time.monotonic()
    spec = load_model_spec(str(folder))
    routers = Routers.of(spec) if sampling.routing_replay else None
    engine = SGLangEngine(found, server, resync, spec.max_positions, routers)
    print(f"SGLang is ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    try:
        if routers is not None:
            engine.demand("rollout.routing_replay", untold_experts)
        if in_place:
            engine.demand("rollout.sync.in_flight: in_place", stale_in_place)
    except UsageError:
        engine.close()
        raise
    stop = tuple(sorted({*stop_tokens(tokenizer), *ends_of_the_model(folder)}))
    reward = TextReward(tokenizer, rewards, sampling.stall_seconds)
    return Sampler(engine, reward, rescue_rules(rescue), sampling, stop, seed)


def ends_of_the_model(folder: Path) -> set[int]:
    """End tokens of config.json, at which SGLang stops whatever it is asked."""
    listed = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    return set(listed) if isinstance(listed, list) else set() if listed is None else {listed}
