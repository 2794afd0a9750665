"""An engine whose responses are a function of the request alone, and that counts what it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from lens_megatron.rewards.judgement import Judgement, verdict_of
from lens_megatron.rollout.engine import Finished, Health, Request
from lens_megatron.types import Prompt


class ScriptedEngine:
    """Each poll finishes one request, the newest first; `dies_after` so many it raises, as a machine that goes away."""

    version = 0
    deterministic = True
    positions = None

    def __init__(self, slots: int = 4, dies_after: int | None = None, aborts: int = 0) -> None:
        self.slots, self.dies_after, self.aborts = slots, dies_after, aborts
        self.running: list[Request] = []
        self.asked: list[Request] = []
        self.gone: list[Request] = []
        self.done = 0
        self.most = 0

    def free_slots(self) -> int:
        return self.slots - len(self.running)

    def submit(self, requests: Sequence[Request]) -> None:
        self.running += requests
        self.asked += requests
        self.most = max(self.most, len(self.running))

    def poll(self, timeout: float) -> list[Finished]:
        if self.dies_after is not None and self.done >= self.dies_after:
            self.running = []
            raise KeyboardInterrupt
        if self.gone:
            gone, self.gone = self.gone, []
            return [Finished(request.id, (), (), "abort") for request in gone]
        if not self.running:
            return []
        request = self.running.pop()
        if self.aborts:
            self.aborts -= 1
            return [Finished(request.id, (), (), "abort")]
        self.done += 1
        tokens = tuple((request.seed >> shift) % 50 for shift in (0, 8, 16))[: request.max_tokens]
        return [Finished(request.id, tokens, (0.0,) * len(tokens), "stop")]

    def abort(self, ids: Iterable[str]) -> None:
        wanted = set(ids)
        self.gone += [request for request in self.running if request.id in wanted]
        self.running = [request for request in self.running if request.id not in wanted]

    def health(self) -> Health:
        return Health(True, len(self.running), 0, 0, self.done)

    def clock(self) -> float:
        return 0.0

    def begin_update(self, version: int) -> None: ...

    def update(self, bucket: object) -> None: ...

    def end_update(self) -> None: ...

    def close(self) -> None: ...


def judged_by(rule: Callable[[Prompt, tuple[int, ...]], float]) -> Callable:
    def judge(prompt: Prompt, response: tuple[int, ...], finish: str) -> tuple[str, Future[Judgement]]:
        reward = rule(prompt, response)
        future: Future[Judgement] = Future()
        future.set_result(Judgement(reward, verdict_of(reward), "", str(response[:1])))
        return " ".join(map(str, response)), future

    return judge
