"""Every key does something, and what a run writes down of its configuration is that configuration."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import lens_megatron
from lens_megatron import presets, strict
from lens_megatron.config import RunConfig, SftConfig, load_run, preset_line
from lens_megatron.errors import UsageError
from lens_megatron.evaluation.config import EvalConfig
from lens_megatron.evaluation.interference import InterferenceConfig

PACKAGE = Path(lens_megatron.__file__).parent


def config_classes(kind: Any) -> Iterator[type]:
    """`kind` and every dataclass among the types of its fields, at any depth."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from config_classes(hint)
    else:
        for part in typing.get_args(kind):
            yield from config_classes(part)


def reads() -> dict[str, set[str]]:
    """attribute name -> where it is read: `file:function`. What a config class checks of itself in __post_init__ does not
    count, and neither does a keyword argument: that writes."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        checks = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks:
                found[node.attr].add(f"{path.relative_to(PACKAGE)}:{_owner(node.value)}")
    return found


def _owner(node: ast.expr) -> str:
    """The last name before the dot: of self.config.rollout.n, `rollout`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else "?"


@pytest.mark.parametrize("root", [RunConfig, SftConfig, EvalConfig, InterferenceConfig])
def test_every_key_is_read_by_something(root: type) -> None:
    where = reads()
    unread = [
        f"{kind.__name__}.{field.name}"
        for kind in dict.fromkeys(config_classes(root))
        for field in dataclasses.fields(kind)
        if not where[field.name]
    ]
    assert unread == []


def test_keys_with_common_names_are_read_off_their_own_section() -> None:
    """`every`, `n` or `keep` occur anywhere; here the section is part of what is looked for."""
    where = reads()
    sections = {
        "diagnostics": ("every",),
        "checkpoint": ("every", "keep", "keep_best", "asynchronous", "hf_every", "hf_keep"),
        "data": ("train", "prompts_per_step", "max_prompt_tokens", "shuffle", "split", "template"),
        "rollout": ("n", "max_response_tokens", "temperature", "schedule", "slots", "threads", "engine"),
        "memory": ("recompute", "offload_optimizer", "offload_reference"),
    }
    # a section is read under its own name, or by what it was handed to as `config`, `self`, ...
    handed_on = {"config", "_config", "self", "settings", "memory", "sampling", "layout"}
    for section, keys in sections.items():
        for key in keys:
            owners = {place.rpartition(":")[2] for place in where[key]}
            assert owners & (handed_on | {section}), f"{section}.{key} is read off {owners}"


CORRECTION = "algorithm.loss.engine_correction.mode"
MINIMAL = {"model": "qwen3-8b-base", "run_dir": "runs/x", "data": {"train": "prompts.jsonl"}}


@pytest.mark.parametrize("preset", presets.preset_names())
def test_every_preset_makes_a_run_that_can_be_written_and_read_again(preset: str, tmp_path: Path) -> None:
    given = tmp_path / "RUN.yaml"
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": preset}))
    config = load_run(given, [])
    assert config.name == preset
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(strict.to_tree(RunConfig, config), sort_keys=False, allow_unicode=True))
    assert load_run(written, []) == config


def test_the_runs_own_values_stand_above_the_presets(tmp_path: Path) -> None:
    given = tmp_path / "RUN.yaml"
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": "dapo", "rollout": {"n": 3}}))
    config = load_run(given, ["data.prompts_per_step=7", "algorithm.loss.clip_high=0.5"])
    assert (config.rollout.n, config.data.prompts_per_step, config.algorithm.loss.clip_high) == (3, 7, 0.5)
    assert config.update.minibatches == 16  # DAPO's
    with pytest.raises(UsageError, match=r"rollout\.stalenes"):
        load_run(given, ["rollout.stalenes=1"])


def test_what_the_preset_sets_of_the_run_is_told(tmp_path: Path) -> None:
    given = tmp_path / "RUN.yaml"
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": "dapo", "rollout": {"n": 3}, "optimizer": {"lr": 1e-5}}))
    line = preset_line(given, ["data.prompts_per_step=7", "algorithm.loss.clip_high=0.5", "optimizer.clip_grad=2"])
    assert line == (
        "from preset dapo: data.max_prompt_tokens=512, rollout.max_response_tokens=20480, rollout.temperature=1.0, "
        "rollout.top_p=1.0, update.minibatches=16, update.epochs=1, update.tokens_per_microbatch=21504, "
        "optimizer.warmup_steps=10, optimizer.weight_decay=0.1"
    )
    for told in line.partition(": ")[2].split(", "):  # as the run has it, and as an override that can be copied
        load_run(given, [told])
        value: Any = load_run(given, [])
        for key in told.partition("=")[0].split("."):
            value = getattr(value, key)
        assert str(value) == told.partition("=")[2]

    algorithm = strict.to_tree(RunConfig, load_run(given, []))["algorithm"]
    for choice in (algorithm, {"rescue": {"mode": "none"}}):  # values of its own: no preset
        given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": choice}))
        assert preset_line(given, []) == ""
    (tmp_path / "mine.yaml").write_text("loss: {clip_low: 0.1}\n")
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": str(tmp_path / "mine.yaml")}))
    assert preset_line(given, []) == ""  # it sets nothing of the run


@pytest.mark.parametrize(
    ("on_logprob_diff", "others", "reason"),
    [
        ("mask_tokens", ["update.old_logprobs=engine"], "nothing to compare"),
        ("drop_sequences", ["update.old_logprobs=engine", "guards.logprob_diff=0.5"], "nothing to compare"),
        ("drop_sequences", ["rollout.staleness=1", f"{CORRECTION}=truncate"], r"no bound.* set guards\.logprob_diff"),
        ("drop_sequences", ["rollout.staleness=1", f"{CORRECTION}=truncate", "guards.logprob_diff=0.5"], None),
        ("mask_tokens", ["rollout.staleness=1", f"{CORRECTION}=truncate"], None),  # token_diff is a bound
        ("drop_sequences", [], None),
        ("stop", ["update.old_logprobs=engine"], None),
        ("report", ["update.old_logprobs=engine", "rollout.staleness=1"], None),
    ],
)
def test_what_could_never_be_left_out_is_refused(
    tmp_path: Path, on_logprob_diff: str, others: list[str], reason: str | None
) -> None:
    given = tmp_path / "RUN.yaml"
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": "grpo"}))
    overrides = [f"guards.on_logprob_diff={on_logprob_diff}", *others]
    if reason is None:
        assert load_run(given, overrides).guards.on_logprob_diff == on_logprob_diff
    else:
        with pytest.raises(UsageError, match=rf"guards\.on_logprob_diff {on_logprob_diff}.*{reason}"):
            load_run(given, overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["rollout.n=1"], r"rollout\.n 1 teaches nothing"),
        (["rollout.n=1", "algorithm.advantage.baseline=original", "algorithm.advantage.std=none"], None),
        (["rewards.default.format.weight=0.5"], "format weight of 0.5 .* reaches .*success_threshold 0.5"),
        (["rewards.default.format.weight=0.49"], None),
        (["rewards.default.format.weight=0.5", "algorithm.rescue.success_threshold=0.9"], None),
        (["rewards.sources.gsm8k.format.weight=0.9", "rewards.sources.gsm8k.kind=numeric"], "format weight of 0.9"),
    ],
)
def test_rewards_that_say_something_else_than_they_seem_to_are_refused(
    tmp_path: Path, overrides: list[str], reason: str | None
) -> None:
    given = tmp_path / "RUN.yaml"
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": "lens"}))
    if reason is None:
        load_run(given, overrides)
    else:
        with pytest.raises(UsageError, match=reason):
            load_run(given, overrides)


def test_only_an_engine_that_tells_its_experts_can_have_them_replayed(tmp_path: Path) -> None:
    given = tmp_path / "RUN.yaml"
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": "grpo"}))
    assert load_run(given, ["rollout.routing_replay=true", "rollout.engine=sglang"]).rollout.routing_replay
    with pytest.raises(UsageError, match=r"rollout\.routing_replay needs rollout\.engine sglang"):
        load_run(given, ["rollout.routing_replay=true"])


@pytest.mark.parametrize(
    ("overrides", "least"),
    [
        (["rollout.max_response_tokens=20480"], 20992),
        (["rollout.max_response_tokens=15873", "data.max_prompt_tokens=512"], 16385),
        (["rollout.max_response_tokens=100", "update.tokens_per_microbatch=600", "parallel.cp=2"], 612),
        (["algorithm=dapo", "update.tokens_per_microbatch=16384"], 20992),
    ],
)
def test_a_budget_that_the_longest_rollout_would_not_fit_is_refused(
    tmp_path: Path, overrides: list[str], least: int
) -> None:
    """Not hours later, by the first response that is as long as it may be."""
    given = tmp_path / "RUN.yaml"
    given.write_text(yaml.safe_dump({**MINIMAL, "algorithm": "grpo"}))
    with pytest.raises(
        UsageError, match=rf"update\.tokens_per_microbatch: \d+ tokens cannot hold .* set at least {least}$"
    ):
        load_run(given, overrides)
    load_run(given, [*overrides, f"update.tokens_per_microbatch={least}"])


def test_the_run_folders_config_is_the_runs(base: Path) -> None:
    again = load_run(base / "config.yaml", [])
    assert yaml.safe_load((base / "config.yaml").read_text()) == strict.to_tree(RunConfig, again)
    given = load_run(base.parent / "RUN.yaml", [])
    assert again == given
