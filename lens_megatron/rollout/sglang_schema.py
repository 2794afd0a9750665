"""What SGLang's answers must look like. The server accepts fields that it does not know, and a proxy may answer in its
place, so every field that is used is checked: a rollout is either exactly what was asked for, or refused in one line."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lens_megatron.errors import RunError
from lens_megatron.routed_experts import Routers, Routing

if TYPE_CHECKING:
    from lens_megatron.types import FinishReason

FIRST_WITH_SESSIONS = (0, 5, 21)
OLDEST_SUPPORTED = (0, 5, 15)
UNUSED_PLACES = 2  # of its context, and of its cache, that a server gives to no rollout
LOGPROB_ROUNDING = 1e-3  # a log-prob may exceed 0 by this much


class BadAnswer(RunError):
    """An answer that is not what SGLang says in such a case."""


@dataclass(frozen=True)
class Generation:
    """One response. `versions`: (weight version as the server names it, first token, end) that cover the tokens; empty
    where the server does not tell when they changed (before 0.5.20), then `version` is what it had at the end."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    version: str
    versions: tuple[tuple[str, int, int], ...]
    prompt_logprobs: tuple[float, ...] = ()  # of the prompt's tokens but the first, where they were asked for
    routing: Routing | None = None  # of prompt and response but the last token, where it was asked for


@dataclass(frozen=True)
class Load:
    """A server's own count of its work, over its data-parallel ranks."""

    running: int
    waiting: int
    used_tokens: int
    most_running: int


@dataclass(frozen=True)
class ServerInfo:
    """What a server was started as."""

    version: tuple[int, int, int]
    tp: int
    dp: int
    pp: int
    most_running: int  # requests at once, over its data-parallel ranks
    context_length: int | None
    dtype: str
    device: str
    raw: Mapping[str, Any]

    @property
    def has_sessions(self) -> bool:
        """Whether weights may come only between begin_weight_update and end_weight_update."""
        return self.version >= FIRST_WITH_SESSIONS

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that the cache of one data-parallel rank holds."""
        value = self.raw.get("max_total_num_tokens")
        return value if isinstance(value, int) and value > 0 else None

    def longest(self, positions: int | None) -> int | None:
        """Tokens of prompt and response together, with a model of so many `positions`: what is asked for beyond them is
        cut without a word."""
        limits = [limit for limit in (self.context_length or positions, self.kv_tokens) if limit is not None]
        return min(limits) - UNUSED_PLACES if limits else None


def parse_version(text: Any) -> tuple[int, int, int]:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text) if isinstance(text, str) else None
    if match is None:
        raise BadAnswer(f"server_info: version {_short(text)} is no version")
    return int(match[1]), int(match[2]), int(match[3])


def parse_generation(
    answer: Any,
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    stop: Sequence[int],
    prompt_logprobs: bool,
    routers: Routers | None = None,
) -> Generation:
    """The answer to one /generate with return_logprob, and with return_routed_experts where `routers` are given."""
    meta = _mapping(_mapping(answer, "generate").get("meta_info"), "generate: meta_info")
    if meta.get("id") != request_id:
        raise BadAnswer(f"generate: asked as {request_id}, answered as {_short(meta.get('id'))}")
    finish = _finish(meta.get("finish_reason"))
    triples = meta.get("output_token_logprobs")
    if triples is None and finish == "abort":  # before the first token
        triples = []
    logprobs, logprob_ids = _logprobs(triples, "output_token_logprobs")
    tokens = answer.get("output_ids")
    if tokens is None and finish == "abort":
        tokens = []
    if not isinstance(tokens, list) or tokens != logprob_ids:
        raise BadAnswer(f"generate: log-probs are of other tokens than output_ids {_short(tokens)}")
    if meta.get("completion_tokens", len(tokens)) != len(tokens):
        raise BadAnswer(f"generate: {len(tokens)} tokens, said to be {_short(meta.get('completion_tokens'))}")
    if finish != "abort" or "prompt_tokens" in meta:
        _equal(meta.get("prompt_tokens"), len(prompt), "generate: tokens of the prompt")
    _check_end(tokens, finish, max_tokens, stop)
    version, versions = _versions(meta, len(tokens))
    rows = len(prompt) + len(tokens) - 1
    experts = None if routers is None else _routing(meta.get("routed_experts"), rows, finish, routers)
    generation = Generation(request_id, tuple(tokens), tuple(logprobs), finish, version, versions, routing=experts)
    if finish == "abort" or not prompt_logprobs:
        return generation
    given = meta.get("input_token_logprobs")
    if not isinstance(given, list) or not given or not isinstance(given[0], list) or not given[0]:
        raise BadAnswer(f"generate: input_token_logprobs are {_short(given)}")
    rest, ids = _logprobs(given[1:], "input_token_logprobs")
    if [given[0][1], *ids] != list(prompt):
        raise BadAnswer("generate: input_token_logprobs are of other tokens than the prompt's")
    return replace(generation, prompt_logprobs=tuple(rest))


def _routing(encoded: Any, rows: int, finish: FinishReason, routers: Routers) -> Routing | None:
    """int32, a row a token: what the server has read, which is all but the last."""
    if finish == "abort" and not encoded:  # what goes on from there is read, and told, from the start
        return None
    if encoded is None:
        raise BadAnswer("generate: no routed_experts: start the server with --enable-return-routed-experts")
    try:
        data = base64.b64decode(encoded, validate=True)
        experts = np.frombuffer(data, np.int32).reshape(rows, -1)
    except (TypeError, ValueError):
        raise BadAnswer(f"generate: routed_experts {_short(encoded)} are not those of {rows} tokens") from None
    if complaint := routers.complaint(experts):
        raise BadAnswer(f"generate: routed_experts: {complaint}: is the server serving this model?")
    return Routing.of(experts)


def _finish(reason: Any) -> FinishReason:
    kind = reason.get("type") if isinstance(reason, Mapping) else None
    if kind not in ("stop", "length", "abort"):
        raise BadAnswer(f"generate: finish_reason is {_short(reason)}")
    return cast("FinishReason", kind)


def _logprobs(triples: Any, what: str) -> tuple[list[float], list[int]]:
    """Log-probs and token ids of `[[log-prob, id, text], ...]`."""
    if not isinstance(triples, list):
        raise BadAnswer(f"generate: {what} is {_short(triples)}")
    try:
        logprobs = [triple[0] for triple in triples]
        ids = [triple[1] for triple in triples]
    except (TypeError, IndexError, KeyError):
        raise BadAnswer(f"generate: {what} is not a list of [log-prob, id, text]") from None
    # sets of types: of a long response one pass each, without a Python call a token
    if not set(map(type, logprobs)) <= {float, int} or not all(map(math.isfinite, logprobs)):
        raise BadAnswer(f"generate: {what} has a log-prob that is no finite number")
    if logprobs and max(logprobs) > LOGPROB_ROUNDING:
        raise BadAnswer(f"generate: {what} has a log-prob of {max(logprobs)}")
    if not set(map(type, ids)) <= {int} or (ids and min(ids) < 0):
        raise BadAnswer(f"generate: {what} has a token that is no token id")
    return logprobs, ids


def _check_end(tokens: Sequence[int], finish: FinishReason, max_tokens: int, stop: Sequence[int]) -> None:
    if len(tokens) > max_tokens:
        raise BadAnswer(f"generate: {len(tokens)} tokens, {max_tokens} were asked for at most")
    if finish == "length" and len(tokens) != max_tokens:
        raise BadAnswer(f"generate: cut at {len(tokens)} tokens, {max_tokens} were asked for")
    if finish == "stop" and (not tokens or tokens[-1] not in stop):
        raise BadAnswer(
            f"generate: ended at token {tokens[-1] if tokens else None}, which is no stop token of the run "
            f"{list(stop)}: the server's model or tokenizer names another end of text"
        )


def _versions(meta: Mapping[str, Any], tokens: int) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    version, spans = meta.get("weight_version"), meta.get("weight_versions")
    if not isinstance(version, str):
        raise BadAnswer(f"generate: weight_version is {_short(version)}")
    if spans is None:
        return version, ()
    if not isinstance(spans, list):
        raise BadAnswer(f"generate: weight_versions is {_short(spans)}")
    result: list[tuple[str, int, int]] = []
    end = 0
    for span in spans:
        fields = _mapping(span, "generate: weight_versions")
        name, first, last = fields.get("version"), fields.get("start"), fields.get("end")
        if not isinstance(name, str) or first != end or not isinstance(last, int) or last < end:
            raise BadAnswer(f"generate: weight_versions {_short(spans)} do not follow one another")
        end = last
        result.append((name, first, last))
    if end != tokens:
        raise BadAnswer(f"generate: weight_versions {_short(spans)} do not cover {tokens} tokens")
    return version, tuple(result)


def parse_server_info(answer: Any) -> ServerInfo:
    info = _mapping(answer, "server_info")
    version = parse_version(info.get("version"))
    states = info.get("internal_states")
    inner = states[0] if isinstance(states, list) and states and isinstance(states[0], Mapping) else {}
    dp = _count(info.get("dp_size"), "server_info: dp_size")
    most = info.get("max_running_requests")  # as it was asked for: of all ranks
    if not most:
        most = dp * _count(inner.get("effective_max_running_requests_per_dp") or 0, "server_info: most per dp rank")
    return ServerInfo(
        version,
        _count(info.get("tp_size"), "server_info: tp_size"),
        dp,
        _count(info.get("pp_size", 1), "server_info: pp_size"),
        _count(most, "server_info: max_running_requests"),
        info.get("context_length"),
        str(info.get("dtype")),
        str(info.get("device")),
        info,
    )


_CHOOSES_INSIDE = ("triton_kernel", "flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4")


def untold_experts(server: Mapping[str, Any]) -> str | None:
    """Why a server started with these arguments does not tell the experts of its tokens, or not the right ones: it notes them
    by the token's place in its cache, on the last pipeline stage (read in SGLang 0.5.21)."""
    if not server.get("enable_return_routed_experts"):
        return "does not tell which experts it took: start it with --enable-return-routed-experts"
    moves = {
        "enable_hierarchical_cache": "what comes back from a lower level of its cache has another token's experts",
        "enable_lmcache": "what comes back from a lower level of its cache has another token's experts",
        "speculative_algorithm": "experts of tokens that were drafted are not told apart",
    }
    for name, why in moves.items():
        if server.get(name):
            return f"was started with {name}: {why}"
    if (server.get("pp_size") or 1) > 1:
        return "was started with pp_size above 1: only the last stage tells its experts"
    if (backend := server.get("moe_runner_backend")) in _CHOOSES_INSIDE:
        return f"was started with moe_runner_backend: {backend}, whose kernel chooses the experts and tells nobody"
    if server.get("disaggregation_mode") not in (None, "null"):
        return "was started with a disaggregation_mode: a prompt's experts stay where it was read"
    return None


# what a server must be started with to take weights while it keeps its rollouts' cache (rollout.sync.in_flight: in_place)
IN_PLACE_ARGUMENTS = {"disable_radix_cache": True, "disable_overlap_schedule": True}


def stale_in_place(server: Mapping[str, Any]) -> str | None:
    """Why a server started with these arguments would go on with old weights, or under a batch that still runs, when weights
    change in place (read in SGLang 0.5.21)."""
    kept = {
        "disable_radix_cache": "it would give new rollouts the cache of old weights, as it does not ask whose it is",
        "disable_overlap_schedule": "weights would change under the batch that it has begun",
    }
    for name in IN_PLACE_ARGUMENTS:
        if not server.get(name):
            return f"was started without {name}: {kept[name]}; start it with --{name.replace('_', '-')}"
    if (server.get("pp_size") or 1) > 1:
        return "was started with pp_size above 1: its stages do not stop for new weights; set in_flight to wait"
    return None


def parse_load(answer: Any) -> Load:
    """/v1/loads: a row for each data-parallel rank."""
    rows = _mapping(answer, "v1/loads").get("loads")
    if not isinstance(rows, list) or not rows:
        raise BadAnswer(f"v1/loads: loads is {_short(rows)}")
    totals = dict.fromkeys(("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_running_requests"), 0)
    for row in rows:
        for name in totals:
            totals[name] += _count(_mapping(row, "v1/loads").get(name), f"v1/loads: {name}")
    return Load(*totals.values())


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadAnswer(f"{what} is {_short(value)}")
    return value


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadAnswer(f"{what} is {_short(value)}")
    return value


def _equal(value: Any, wanted: int, what: str) -> None:
    if value != wanted:
        raise BadAnswer(f"{what}: {wanted} were sent, {_short(value)} were read")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
