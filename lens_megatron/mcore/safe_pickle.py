"""Pickles that others wrote: only classes on a list are ever looked up, so that loading one cannot run anything else."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import IO, Any

from lens_megatron.errors import UsageError


class Refused(UsageError):
    """Not damage, which an older file may stand in for: someone has put this there."""


class AllowList(pickle.Unpickler):
    """`allowed`: (module, name) -> what stands for it. Everything else is refused, before it is imported."""

    def __init__(self, file: IO[bytes], allowed: Mapping[tuple[str, str], Any], where: str) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise Refused(
                f"{self._where}: asks for {module}.{name}, which a checkpoint has no use for; not loaded: "
                "the file may be an attack"
            ) from None


def load(file: IO[bytes], allowed: Mapping[tuple[str, str], Any], where: str) -> Any:
    try:
        return AllowList(file, allowed, where).load()
    except (UsageError, OSError):  # what a file system says is not about the bytes
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UsageError(f"{where}: not readable ({type(error).__name__}: {error}); damaged or cut off") from None
