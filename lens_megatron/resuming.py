"""What a resumed run's configuration may change: each change is told, and those that would make it another run refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lens_megatron import checkpoints, strict
from lens_megatron.config import RunConfig
from lens_megatron.errors import UsageError
from lens_megatron.run_folder import RunFolder

# what the steps made so far would not have been made with; of data.train, limits and template the checkpoint itself knows
_FIXED = ("seed", "algorithm", "data.prompts_per_step", "data.shuffle")
_UNTOLD = ("run_dir",)  # the folder may have been moved


def changes(folder: RunFolder, tree: Mapping[str, Any]) -> list[str]:
    """A line for each key that is another one than in the folder's config.yaml."""
    before, refusal = _saved(folder)
    told = _different(before, strict.flat(tree), only_shared=bool(refusal))
    # what a version refuses may be no more than a value that did nothing: it cannot be put back
    fixed = [told[key] for key in told if is_part(key, _FIXED[:1] + _FIXED[2:] if refusal else _FIXED)]
    if fixed and checkpoints.latest(folder.checkpoints) is not None:
        raise UsageError(
            f"{folder.path} cannot be resumed as another run: {'; '.join(fixed)}: put it back, or start in another "
            "run_dir (from its weights: lens-megatron convert megatron-to-hf)"
        )
    notes = [f"the run's own configuration is not one that this version takes: {refusal}"] if refusal else []
    return [*notes, *(f"resumed with a change: {line}" for line in told.values())]


def differences(folder: RunFolder, tree: Mapping[str, Any]) -> dict[str, str]:
    """By key what was another in the folder's config.yaml, in words; none where nothing has run. What that file does not
    say is the default."""
    before, refusal = _saved(folder)
    return _different(before, strict.flat(tree), only_shared=bool(refusal))


def _saved(folder: RunFolder) -> tuple[dict[str, Any], str]:
    """The leaves of config.yaml; and why this version does not take it, if so: then as they stand there."""
    earlier = folder.read_config()
    if not earlier:
        return {}, ""
    try:
        read = strict.build(RunConfig, earlier, str(folder.path / "config.yaml"))
    except UsageError as error:
        return strict.flat(earlier), str(error)
    return strict.flat(strict.to_tree(RunConfig, read)), ""


def _different(before: Mapping[str, Any], now: Mapping[str, Any], only_shared: bool) -> dict[str, str]:
    keys = [key for key in {**before, **now} if before and before.get(key) != now.get(key) and key not in _UNTOLD]
    if only_shared:
        keys = [key for key in keys if key in before and key in now]
    return {key: f"{key} was {_shown(before, key)} and is {_shown(now, key)}" for key in keys}


def is_part(key: str, sections: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in sections)


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    if key not in leaves:
        return "not there"
    value = leaves[key]
    return "null" if value is None else str(value)
