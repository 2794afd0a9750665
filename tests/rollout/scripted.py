"""An engine whose responses follow from the request alone and finish in any order one likes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lens_megatron.rollout.engine import Finished, Health, Request, derive_seed
from lens_megatron.types import Prompt, PurifiedPrompt, Rollout


def response_of(request: Request) -> Finished:
    rng = random.Random(derive_seed(request.prompt, request.seed))
    length = rng.randint(1, request.max_tokens)
    tokens = tuple(rng.randrange(1, 100) for _ in range(length))  # 0 is the stop token: a response would end there
    return Finished(request.id, tokens, tuple(-0.5 for _ in tokens), "stop")


def reward_of(prompt: Prompt, rollout: Rollout) -> float:
    """Success is likelier under x' (one token shorter) and differs from prompt to prompt."""
    luck = random.Random(derive_seed(rollout.roll_tokens, rollout.response)).random()
    rate = random.Random(prompt.id).random() + (0.2 if rollout.purified else 0.0)
    return float(luck < rate)


class ScriptedEngine:
    deterministic = True
    positions = None
    version = 0

    def __init__(self, slots: int, order_seed: int, abort_chance: float = 0.0) -> None:
        self.slots, self.rng, self.abort_chance = slots, random.Random(order_seed), abort_chance
        self.running: dict[str, Request] = {}
        self.aborted: list[Finished] = []
        self.log: list[tuple[str, Any]] = []
        self.time = 0.0
        self.hung = False

    def free_slots(self) -> int:
        return self.slots - len(self.running)

    def submit(self, requests: Sequence[Request]) -> None:
        assert len(requests) <= self.free_slots(), "more than the engine has room for"
        for request in requests:
            assert request.id not in self.running
            self.running[request.id] = request
            self.log.append(("submit", request))

    def poll(self, timeout: float) -> list[Finished]:
        self.time += 1.0
        done, self.aborted = self.aborted, []
        if self.hung:
            return done
        for _ in range(self.rng.randint(1, 3)):
            if self.running:
                request = self.running.pop(self.rng.choice(sorted(self.running)))
                whole = response_of(request)
                if self.rng.random() < self.abort_chance:
                    whole = Finished(request.id, whole.tokens[:1], whole.logprobs[:1], "abort")
                done.append(whole)
                self.log.append(("finish", request))
        return done

    def abort(self, ids: Iterable[str]) -> None:
        for request_id in ids:
            if request := self.running.pop(request_id, None):
                whole = response_of(request)
                self.aborted.append(Finished(request.id, whole.tokens[:1], whole.logprobs[:1], "abort"))
                self.log.append(("abort", request))

    def begin_update(self, version: int) -> None: ...

    def update(self, bucket: Mapping[str, Any]) -> None: ...

    def end_update(self) -> None: ...

    def clock(self) -> float:
        return self.time

    def health(self) -> Health:
        return Health(True, len(self.running), 0, 0)

    def close(self) -> None: ...


def prompts(count: int) -> tuple[list[Prompt], list[PurifiedPrompt | None]]:
    originals = [Prompt(f"p{i}", (i + 1, 7, 8, 9), (1, 4), "1") for i in range(count)]
    purified = [None if i % 5 == 4 else PurifiedPrompt(p.id, (i + 1, 8, 9), (1,)) for i, p in enumerate(originals)]
    return originals, purified
