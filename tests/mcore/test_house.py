"""The files that the package's docstring names are there."""

from __future__ import annotations

import re
from pathlib import Path

from lens_megatron import mcore


def test_every_file_named_in_the_docstring_exists() -> None:
    listed = re.findall(r"\b(\w+\.py)\b", mcore.__doc__ or "")
    there = {path.name for path in Path(mcore.__file__).parent.glob("*.py")}
    assert len(listed) > 20 and len(set(listed)) == len(listed)
    assert set(listed) <= there
