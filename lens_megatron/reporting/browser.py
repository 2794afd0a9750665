"""Which rollouts a report's page carries: a few prompts of the first, middle and last saved step of each run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lens_megatron.reporting.heatmap import score_shares
from lens_megatron.reporting.runs import Run, is_number
from lens_megatron.run_folder import RunFolder

PROMPTS_A_STEP = 12
RESPONSE_LETTERS = 3000  # of a response; its start and its end, where the answer stands
PAGE_BYTES = 3_000_000  # for all rollouts of all runs
_PROMPT_COLUMNS = ("prompt_id", "purified", "origin", "success")
_COLUMNS = (
    *_PROMPT_COLUMNS,
    *("source", "answer", "question", "index", "trained", "prompt_pieces", "scores", "deleted"),
    *("response", "response_text", "reward", "finish", "advantage", "weight"),
)


def browser_data(runs: Sequence[Run]) -> dict[str, Any]:
    """{"runs": [{"name", "steps": [{"step", "prompts": [...], "of": prompts in the step}]}]}, small enough for a page."""
    chosen = [(run, step) for run in runs if run.folder for step in first_middle_last(run.folder.rollout_steps())]
    allowed = PAGE_BYTES // max(1, len(chosen))
    by_run: dict[str, list[dict[str, Any]]] = {run.name: [] for run in runs}
    for run, step in chosen:
        assert run.folder is not None
        by_run[run.name].append(step_entry(run.folder, step, allowed))
    return {"runs": [{"name": name, "steps": steps} for name, steps in by_run.items()]}


def first_middle_last(steps: Sequence[int]) -> list[int]:
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []


def step_entry(folder: RunFolder, step: int, allowed_bytes: int) -> dict[str, Any]:
    """Prompts in the order of interest, until there are enough or no room is left (one is always shown)."""
    by_prompt = _by_prompt(folder.read_rollout_columns(step, _PROMPT_COLUMNS))
    ids = sorted(by_prompt, key=lambda prompt: (-_interest(by_prompt[prompt]), prompt))[:PROMPTS_A_STEP]
    full = _by_prompt(folder.read_rollout_columns(step, _COLUMNS, ids))
    prompts: list[dict[str, Any]] = []
    used = 0
    for prompt_id in ids:
        entry = prompt_entry(prompt_id, full[prompt_id])
        used += len(json.dumps(entry))
        if prompts and used > allowed_bytes:
            break
        prompts.append(entry)
    return {"step": step, "of": len(by_prompt), "prompts": prompts}


def prompt_entry(prompt_id: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = next((row for row in rows if row["deleted"]), rows[0])
    scores = [float(f"{score:.4g}") if is_number(score) else None for score in first["scores"] or ()]
    pieces = list(first["prompt_pieces"] or ())
    return {
        "id": prompt_id,
        "source": first["source"],
        "answer": first["answer"],
        "question": first["question"],
        "pieces": pieces,
        "scores": scores or [None] * len(pieces),
        "shares": [round(share, 3) for share in score_shares(scores)] or [0] * len(pieces),
        "deleted": list(first["deleted"] or ()),
        "rollouts": [_rollout_entry(row) for row in sorted(rows, key=lambda row: (row["purified"], row["index"]))],
    }


def _rollout_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("index", "purified", "origin", "trained", "success", "finish")
    numbers = {name: row[name] if is_number(row[name]) else None for name in ("reward", "advantage", "weight")}
    return (
        {name: row[name] for name in kept}
        | numbers
        | {
            "tokens": len(row["response"] or ()),
            "text": shorten(row["response_text"] or ""),
        }
    )


def shorten(text: str, most: int = RESPONSE_LETTERS) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return groups


def _interest(rows: Sequence[Mapping[str, Any]]) -> int:
    """Rescued prompts, then purified in vain, then those with both outcomes, then all failed, then all solved."""
    if any(row["origin"] == "purified" for row in rows):
        return 4
    if any(row["purified"] for row in rows):
        return 3
    outcomes = {bool(row["success"]) for row in rows}
    return 2 if len(outcomes) == 2 else int(outcomes == {False})
