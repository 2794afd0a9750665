"""Ranks that succeed or fail together: an error of one is raised by all, so that nobody waits for a rank that has left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lens_megatron.errors import RunError, UsageError

_T = TypeVar("_T")


def unlimited(limit_s: float | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


# Around what rank 0 does while the others wait. A watch sets it, to speak before they give up; None: the limit of collectives.
limited: Callable[[float | None], contextlib.AbstractContextManager[None]] = unlimited


def on_rank_0(action: Callable[[], _T]) -> _T:
    """Rank 0's result, or its error, on every rank. Collective: no action that the others take part in."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            with limited(None):
                answer = [("done", action())]
        except (UsageError, RunError) as error:
            answer = [("UsageError" if isinstance(error, UsageError) else "RunError", str(error))]
        except Exception as error:
            answer = [("RunError", one_line(error))]
    dist.broadcast_object_list(answer, src=0)
    kind, value = answer[0]
    if kind == "done":
        return value
    raise UsageError(value) if kind == "UsageError" else RunError(value)


def everywhere(action: Callable[[], _T]) -> _T:
    """Each rank's own result, unless one failed: then the first one's error on every rank. Collective.

    An action that is collective itself must not fail on one rank while others wait inside it.
    """
    result: Any = None
    error: str | None = None
    try:
        result = action()
    except Exception as failure:
        error = one_line(failure)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, reason in enumerate(errors):
        if reason is not None:
            raise RunError(f"rank {rank}: {reason}")
    return result


# of NCCL and gloo
_OTHERS_END = ("gloo", "ncclRemoteError", "remote process", "Connection closed", "timeout", "timed out", "was aborted")


def is_of_transport(error: Exception) -> bool:
    """Another rank went away, or is not heard any more. What NCCL has to say of this rank, its memory say, is no such word."""
    if isinstance(error, dist.DistBackendError):
        return any(sign in str(error) for sign in _OTHERS_END)
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (UsageError, RunError)):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]
