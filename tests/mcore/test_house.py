"""The map in the package's docstring is whole."""

from __future__ import annotations

import re
from pathlib import Path

from lens_megatron import mcore


def test_the_docstring_names_every_file_and_no_other() -> None:
    listed = re.findall(r"\b(\w+\.py)\b", mcore.__doc__ or "")
    there = {path.name for path in Path(mcore.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(there)
