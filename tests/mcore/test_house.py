"""The list of files in the package's docstring is the files that there are."""

from __future__ import annotations

import re
from pathlib import Path

from lens_megatron import mcore


def test_every_file_is_in_the_docstring() -> None:
    listed = re.findall(r"\b(\w+\.py)\b", mcore.__doc__ or "")
    there = {path.name for path in Path(mcore.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(there)
