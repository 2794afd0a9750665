"""Functions of the user's own, named in a configuration as `module:function`: rewards, advantages, losses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@cache
def load(name: str) -> Callable[..., Any]:
    """From the working folder too, whichever way the command was started. ValueError says what is wrong with the name."""
    module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{name}: cannot import {module_name}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{name}: {module_name} has no function {attribute}")
    return function


def named(name: str, table: Mapping[str, F]) -> F:
    """An entry of the table, or a function of the user's own."""
    if name in table:
        return table[name]
    if ":" in name:
        return load(name)  # type: ignore[return-value]
    raise ValueError(f"{name!r} is none of {', '.join(table)}, and no function of your own, as my_module:my_function")
