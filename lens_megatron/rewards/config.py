"""The `rewards` section of a run: which rule judges which source, and the limits that every rule works under."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from lens_megatron.machine import usable_cores

Kind = Literal["math", "exact", "numeric", "choice", "function", "http"]
CUSTOM_KINDS = ("function", "http")


@dataclass(frozen=True)
class FormatRule:
    """reward = (1 - weight) * the answer's reward + weight * [the response matches `pattern`].

    `pattern` is a regular expression that has to occur in the response; "boxed" and "think" are names of shipped ones.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    pattern: str = "boxed"
    weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight is above 0 and at most 1 (got {self.weight})")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class RewardRule:
    """How the responses to one source's prompts are judged.

    kind          math (math-verify), exact text, numeric, choice (a letter), function (the user's own), http.
    answer_in     "anywhere": the last \\boxed{}, else `answer is ...`, else what the response ends with; "boxed": only that.
    tolerance     of numbers, relative; 0: exact, and decimals with six digits or more may round an exact answer.
    percent       "strict": 50% is not 50; "lenient": a percent sign that the answer lacks is overlooked.
    partial       several answers: the share found (wrong ones subtract) instead of all or nothing.
    alternatives  text that separates acceptable answers in the data's answer, such as "|||".
    function      module:name, sync or async, called with (response, answer, source); a number in [0, 1], or a mapping
                  with "reward" and maybe "verdict".
    url           receives POST {"response", "answer", "source"} as JSON, returns {"reward"}.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    kind: Kind = "math"
    answer_in: Literal["anywhere", "boxed"] = "anywhere"
    tolerance: float = 0.0
    percent: Literal["strict", "lenient"] = "strict"
    partial: bool = False
    alternatives: str | None = None
    format: FormatRule | None = None
    function: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is a share of the answer, 0 to below 1 (got {self.tolerance})")
        if (self.function is not None) != (self.kind == "function"):
            raise ValueError("function: module:name goes with kind: function, and kind: function needs it")
        if self.function is not None and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise ValueError(f"function {self.function!r}: write it as module:name")
        if (self.url is not None) != (self.kind == "http"):
            raise ValueError("url goes with kind: http, and kind: http needs it")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r}: write it as http://host:port/path")
        if self.partial and self.kind != "math":
            raise ValueError(f"partial goes with kind: math (got {self.kind})")
        if self.alternatives == "":
            raise ValueError("alternatives: give the text between two answers, or null")

    @property
    def custom(self) -> bool:
        """Runs code or asks a server of the user's."""
        return self.kind in CUSTOM_KINDS


@dataclass(frozen=True)
class RewardConfig:
    """workers             processes for the shipped rules; 0: one a core, 8 at most. As many again for function and http rules.
    seconds             of CPU that one judgement may take.
    wall_seconds        that it may take whatever it does; for functions and servers the only limit of time.
    memory_mib          address space of a worker; 0: unlimited, for a function that loads a model.
    cache               judgements remembered by (source's rule, answer, response); 0: none.
    max_response_chars  longer responses are unparsable, unread.
    default             the rule of sources that are not named; null: such a source is an error.
    sources             a rule for each data source; names may be patterns such as "openai/*"; the first that fits counts.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    workers: int = 0
    seconds: float = 2.0
    wall_seconds: float = 30.0
    memory_mib: int = 1024
    cache: int = 65536
    max_response_chars: int = 400_000
    default: RewardRule | None = field(default_factory=RewardRule)
    sources: dict[str, RewardRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 0 or self.cache < 0 or self.max_response_chars < 1:
            raise ValueError("workers and cache are at least 0, max_response_chars at least 1")
        if self.seconds <= 0 or self.wall_seconds < self.seconds:
            raise ValueError(f"seconds={self.seconds} is above 0 and at most wall_seconds={self.wall_seconds}")
        if self.memory_mib != 0 and self.memory_mib < 256:
            raise ValueError(f"memory_mib={self.memory_mib}: a worker needs 256 (0: unlimited)")

    @property
    def processes(self) -> int:
        return self.workers or min(8, usable_cores())

    def rule(self, source: str) -> RewardRule | None:
        """The rule of a data source; None: it has none."""
        if source in self.sources:
            return self.sources[source]
        fitting = (rule for pattern, rule in self.sources.items() if fnmatchcase(source, pattern))
        return next(fitting, self.default)

    @property
    def rules(self) -> list[RewardRule]:
        return [*self.sources.values(), *([self.default] if self.default else [])]
