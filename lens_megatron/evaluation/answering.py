"""Questions in, judged answers out, through any engine. `eval`, evaluation during training and `analyze` all come here.

Nothing of a run's sampler is touched: the engine is used between its batches, with seeds of the questions' own.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from lens_megatron.errors import RunError
from lens_megatron.evaluation.sets import Question
from lens_megatron.rewards.judgement import Judgement, Verdict
from lens_megatron.rollout.engine import Engine, Finished, Request
from lens_megatron.types import FinishReason, Prompt

# (prompt, tokens of the response, how it ended) -> its text, and what will be said of it
Judge = Callable[[Prompt, tuple[int, ...], str], tuple[str, "Future[Judgement]"]]
POLL_SECONDS = 1.0
POLL_SECONDS_WHILE_JUDGING = 0.02
IDLE_SECONDS = 30.0  # for aborted responses to come back
MAX_ABORTS = 3  # of one response, by the engine


@dataclass(frozen=True)
class Answer:
    """One response and what was said of it: a line of the answers' file."""

    set: str
    id: str
    index: int
    prompt: str  # fingerprint
    response: str
    tokens: int
    finish: FinishReason
    reward: float
    verdict: Verdict
    note: str
    extracted: str
    rules: str = ""  # by which it was judged; a file's answers may outlive them
    answer_reward: float | None = None

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.set, self.id, self.index, self.prompt

    @property
    def score(self) -> float:
        """The reward of the answer alone: what a format rule adds to it or takes from it is for training."""
        return self.reward if self.answer_reward is None else self.answer_reward

    @property
    def right(self) -> bool:
        """Accuracy and pass@k count these. Partial credit is no success, and a format rule changes no verdict."""
        return self.verdict == "correct"


@dataclass(frozen=True)
class Limits:
    """How every response is sampled. `positions`: of the model; a response ends where they do,
    or the engine's."""

    max_tokens: int
    positions: int
    stop_tokens: tuple[int, ...] = ()  # in training the sampler's
    temperature: float = 1.0
    top_p: float = 1.0
    stall_seconds: float = 600.0


def answer_all(
    engine: Engine,
    judge: Judge,
    questions: Sequence[Question],
    limits: Limits,
    on_answer: Callable[[Question, Answer], None],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """`on_answer` is called for each as soon as it is judged, in any order. On an error the engine is left idle."""
    answering = _Answering(engine, judge, questions, limits, on_answer)
    try:
        while answering.open():
            if stopped():
                raise RunError("the evaluation was stopped")
            answering.advance()
    finally:
        answering.leave_engine_idle()


class _Answering:
    def __init__(
        self,
        engine: Engine,
        judge: Judge,
        questions: Sequence[Question],
        limits: Limits,
        on_answer: Callable[[Question, Answer], None],
    ) -> None:
        self.engine, self.judge, self.limits, self.on_answer = engine, judge, limits, on_answer
        self.positions = min(limits.positions, engine.positions or limits.positions)
        self.waiting = deque(questions)
        self.in_flight: dict[str, Question] = {}
        self.judging: dict[Future[Judgement], tuple[Question, str, Finished]] = {}
        self.aborts: Counter[tuple[str, str, int, str]] = Counter()
        self.requests = 0
        self.moved_at = self.asked_at = time.monotonic()
        self.progress = -1

    def open(self) -> bool:
        return bool(self.waiting or self.in_flight or self.judging)

    def advance(self) -> None:
        self._submit()
        moved = False
        if self.in_flight:
            for finished in self.engine.poll(POLL_SECONDS_WHILE_JUDGING if self.judging else POLL_SECONDS):
                moved = True
                self._finished(finished)
        else:
            wait(self.judging, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in [future for future in self.judging if future.done()]:
            moved = True
            self._judged(*self.judging.pop(future), future.result())
        self._watch_for_stalls(moved)

    def leave_engine_idle(self) -> None:
        """After an error: what still runs must not meet the next weights or the next batch."""
        for future in self.judging:
            future.cancel()
        deadline = time.monotonic() + IDLE_SECONDS
        self.engine.abort(list(self.in_flight))
        while self.in_flight and time.monotonic() < deadline:
            for finished in self.engine.poll(POLL_SECONDS):
                self.in_flight.pop(finished.id, None)

    def _submit(self) -> None:
        requests = []
        for _ in range(min(self.engine.free_slots(), len(self.waiting))):
            question = self.waiting.popleft()
            room = self.positions - len(question.prompt.tokens)
            if room < 1:
                self._ask_judge(question, Finished("", (), (), "length"))  # no place for a token: judged as empty
                continue
            request_id = f"evaluation/{question.set}/{question.prompt.id}/{question.index}/{self.requests}"
            self.requests += 1
            self.in_flight[request_id] = question
            requests.append(
                Request(
                    request_id,
                    question.prompt.tokens,
                    min(self.limits.max_tokens, room),
                    self.limits.stop_tokens,
                    self.limits.temperature,
                    self.limits.top_p,
                    question.seed,
                )
            )
        if requests:
            self.engine.submit(requests)

    def _finished(self, finished: Finished) -> None:
        question = self.in_flight.pop(finished.id, None)
        if question is None:
            raise RunError(f"the engine returned a response that nobody is waiting for: {finished.id}")
        if finished.finish != "abort":
            self._ask_judge(question, finished)
            return
        self.aborts[question.key] += 1  # not by us: a server went away, or took new weights
        if self.aborts[question.key] > MAX_ABORTS:
            raise RunError(
                f"the engine aborted a response {self.aborts[question.key]} times ({question.set} {question.prompt.id}): "
                f"{self.engine.health()}"
            )
        self.waiting.appendleft(question)

    def _ask_judge(self, question: Question, finished: Finished) -> None:
        text, judgement = self.judge(question.prompt, finished.tokens, finished.finish)
        self.judging[judgement] = (question, text, finished)

    def _judged(self, question: Question, text: str, finished: Finished, judgement: Judgement) -> None:
        set_name, prompt_id, index, prompt = question.key
        answer = Answer(
            set=set_name,
            id=prompt_id,
            index=index,
            prompt=prompt,
            response=text,
            tokens=len(finished.tokens),
            finish=finished.finish,
            reward=judgement.reward,
            verdict=judgement.verdict,
            note=judgement.note,
            extracted=judgement.extracted,
            answer_reward=judgement.answer_reward,
        )
        self.on_answer(question, answer)

    def _watch_for_stalls(self, moved: bool) -> None:
        now = time.monotonic()
        if moved:
            self.moved_at = now
        if now - max(self.moved_at, self.asked_at) < POLL_SECONDS:
            return
        self.asked_at = now
        health = self.engine.health()
        if not health.ok:
            raise RunError(f"the engine is not well: {health.detail or health}")
        if health.progress != self.progress:
            self.progress, self.moved_at = health.progress, now
        elif now - self.moved_at > self.limits.stall_seconds:
            raise RunError(
                f"evaluation stalled: nothing for {self.limits.stall_seconds:g} s with {len(self.in_flight)} responses in "
                f"flight and {len(self.judging)} to be judged ({health})"
            )
