"""Rewards of the user's own: a Python function, sync or async, or an HTTP server. Run in workers kept for them."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, get_args

from lens_megatron import own_functions
from lens_megatron.rewards.config import RewardRule
from lens_megatron.rewards.judge import with_format
from lens_megatron.rewards.judgement import Judgement, Verdict, verdict_of

ATTEMPTS = 3
MAX_REPLY_BYTES = 1 << 20


class CustomRewardError(Exception):
    """The user's function or server failed: the run stops, for a reward of 0 would teach that the answer was wrong."""


def load(name: str) -> Callable[..., Any]:
    """`module:function`."""
    try:
        return own_functions.load(name)
    except ValueError as error:
        raise CustomRewardError(f"reward function {error}") from error


def missing(names: Sequence[str]) -> str:
    """What is wrong with the first that `load` does not find; "" when all are there."""
    for name in names:
        try:
            load(name)
        except CustomRewardError as error:
            return str(error)
    return ""


def judge_custom(rule: RewardRule, source: str, answer: str, response: str, seconds: float) -> Judgement:
    if rule.kind == "function":
        judged = _by_function(str(rule.function), source, answer, response)
    else:
        judged = _by_server(str(rule.url), source, answer, response, seconds)
    return with_format(rule, response, judged)


def _by_function(name: str, source: str, answer: str, response: str) -> Judgement:
    function = load(name)
    try:
        result = function(response, answer, source)
        if inspect.isawaitable(result):
            result = asyncio.run(_finished(result))
    except MemoryError:
        raise
    except Exception as error:
        raise CustomRewardError(f"reward function {name} raised {type(error).__name__}: {error}") from error
    return _read_result(result, f"reward function {name}")


async def _finished(awaitable: Any) -> Any:
    return await awaitable


def _by_server(url: str, source: str, answer: str, response: str, seconds: float) -> Judgement:
    body = json.dumps({"response": response, "answer": answer, "source": source}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    deadline = time.monotonic() + 0.9 * seconds
    problem: object = "no time left"
    for attempt in range(ATTEMPTS):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            with urllib.request.urlopen(request, timeout=left / (ATTEMPTS - attempt)) as reply:
                result = json.loads(reply.read(MAX_REPLY_BYTES))
            return _read_result(result, f"reward server {url}")
        except (OSError, ValueError) as error:
            problem = error
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
            time.sleep(min(0.2 * 2**attempt, max(0.0, deadline - time.monotonic())))
    raise CustomRewardError(f"reward server {url}: {problem}")


def _read_result(result: Any, where: str) -> Judgement:
    verdict = result.get("verdict") if isinstance(result, dict) else None
    reward = result.get("reward") if isinstance(result, dict) else result
    if reward is not None and hasattr(reward, "item"):
        reward = reward.item()  # numpy's and torch's numbers
    if not isinstance(reward, (bool, int, float)) or not math.isfinite(reward) or not 0 <= reward <= 1:
        raise CustomRewardError(f"{where} gave {str(result)[:100]!r}; expected a number from 0 to 1")
    if verdict is not None and verdict not in get_args(Verdict):
        raise CustomRewardError(f"{where} gave verdict {str(verdict)[:50]!r}; one of {', '.join(get_args(Verdict))}")
    return Judgement(float(reward), verdict or verdict_of(float(reward)))
