"""Packages that sglang imports and, for a text model on CPU, never calls.

Every name of a stand-in is a function that raises, so none can return a wrong number in silence.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn


def stand_in(name: str, classes: dict[str, type] | None = None) -> Callable[[str], Any]:
    """A module's `__getattr__`: the given classes, and else functions that raise."""

    def attribute(wanted: str) -> Any:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        if classes and wanted in classes:
            return classes[wanted]

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"{name}.{wanted}: a stand-in of the CPU tests, which must never be called")

        missing.__name__ = wanted
        return missing

    return attribute


class Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `package.anything` importable as a stand-in, but for the `absent`."""

    def __init__(self, package: str, classes: dict[str, type] | None = None, absent: tuple[str, ...] = ()) -> None:
        self.package, self.classes, self.absent = package, classes, absent
        sys.meta_path.append(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith(f"{self.package}.") or fullname.removeprefix(f"{self.package}.") in self.absent:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = stand_in(spec.name, self.classes)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass
