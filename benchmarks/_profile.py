"""CPU and wall seconds by section: each section's own, without the sections called from within."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Profile:
    cpu: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _stack: list[list[float]] = field(default_factory=list)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        inside = [0.0, 0.0]
        self._stack.append(inside)
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            spent = time.process_time() - cpu, time.perf_counter() - wall
            self._stack.pop()
            if self._stack:
                for place in (0, 1):
                    self._stack[-1][place] += spent[place]
            self.add(name, spent[0] - inside[0], spent[1] - inside[1])

    def add(self, name: str, cpu: float, wall: float = 0.0) -> None:
        self.cpu[name] = self.cpu.get(name, 0.0) + cpu
        self.wall[name] = self.wall.get(name, 0.0) + wall
        self.calls[name] = self.calls.get(name, 0) + 1

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                result = function(*args, **kwargs)
                return iter(list(result)) if isinstance(result, Iterator) else result

        return call
