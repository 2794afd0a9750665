"""What the documentation says exists: keys with their defaults, metric names, commands, links."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_megatron import strict
from lens_megatron.algorithms.filters import FilterConfig, PromptFilter
from lens_megatron.algorithms.group_metrics import group_metrics
from lens_megatron.algorithms.loss_config import EngineCorrectionConfig, EntropySplitConfig, LossConfig
from lens_megatron.algorithms.loss_metrics import finish_metrics
from lens_megatron.algorithms.rescue import RescueConfig, rebuild_group
from lens_megatron.algorithms.transfer import TransferTracker
from lens_megatron.cli import build_parser, command_names, main
from lens_megatron.config import RunConfig, SftConfig, load_run
from lens_megatron.evaluation.answering import Answer
from lens_megatron.evaluation.results import step_metrics
from lens_megatron.evaluation.sets import EvalSet
from lens_megatron.purification.strategies import Outcome
from lens_megatron.rollout.sampling import SampleCounts
from lens_megatron.step_line import EVERY_STEP
from lens_megatron.types import Prompt
from tests.algorithms.minibatches import as_parameters, random_minibatch, whole
from tests.algorithms.rescue_groups import X, binary, group

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNING = (ROOT / "docs" / "running.md").read_text()
REQUIRED = "required"


# --- keys


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a section and its default; a section that may be null gives its own key too."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        default = _default(field)
        arguments = () if typing.get_origin(hint) is dict else typing.get_args(hint)
        section = next((part for part in (hint, *arguments) if dataclasses.is_dataclass(part)), None)
        if section is None or default is None:
            yield name, default
        if section is not None:
            yield from leaves(typing.cast(type, section), f"{name}.")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return REQUIRED if field.default_factory is dataclasses.MISSING else field.default_factory()


def table_rows(text: str, heading: str) -> dict[str, str]:
    """Tables of `| key | default | |` under a heading, up to the next one of its level."""
    (_, _, rest) = text.partition(f"\n## {heading}\n")
    section = rest.partition("\n## ")[0]
    assert section, f"no section {heading}"
    rows = re.findall(r"^\| `([\w.]+)` \| (`[^|]*`|required) \|", section, re.MULTILINE)
    assert len(rows) == len({key for key, _ in rows}), "a key twice"
    return {key: default.strip("`") for key, default in rows}


def check_table(rows: dict[str, str], expected: dict[str, Any]) -> None:
    assert set(rows) == set(expected)
    for key, default in expected.items():
        if default == REQUIRED:
            assert rows[key] == REQUIRED, key
            continue
        shown = strict.parse_yaml(rows[key], key)
        meant = list(default) if isinstance(default, tuple) else default
        assert (shown, type(shown)) == (meant, type(meant)), key


def test_every_key_of_a_run_with_its_default() -> None:
    check_table(table_rows(RUNNING, "Every key of RUN.yaml"), dict(leaves(RunConfig)))


def test_every_key_of_sft_with_its_default() -> None:
    sections = {"parallel", "memory", "optimizer"}
    own = {key: default for key, default in leaves(SftConfig) if key.partition(".")[0] not in sections}
    check_table(table_rows(RUNNING, "Every key of SFT.yaml"), own)
    hints, of_run = typing.get_type_hints(SftConfig), typing.get_type_hints(RunConfig)
    assert all(hints[name] is of_run[name] for name in sections), "sections are described once, for both"


def test_the_check_of_keys_notices() -> None:
    rows = table_rows(RUNNING, "Every key of RUN.yaml")
    expected = dict(leaves(RunConfig))
    for wrong in ({**rows, "steps": "301"}, {**rows, "new": "1"}, {k: v for k, v in rows.items() if k != "seed"}):
        with pytest.raises(AssertionError):
            check_table(wrong, expected)


# --- metrics


def documented_metrics() -> set[str]:
    """First cells of the metric tables, which may hold several names and patterns."""
    pages = (RUNNING.partition("\n## Metrics\n")[2], (ROOT / "docs" / "algorithms.md").read_text())
    assert pages[0]
    cells = [cell for page in pages for cell in re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def written_metrics() -> set[str]:
    """Names that the code gives when asked for everything it measures."""
    lens = RescueConfig(mode="purification")
    groups = [
        rebuild_group(group(binary(y), binary(again) if again else (), str(y)), lens, seed=0, step=0)
        for y, again in ((0, 3), (2, 8), (6, 8), (8, 0))
    ]
    names = set(EVERY_STEP) | {"truncated_ratio", "noise_floor", "grad_norm", "lr", "skipped"}
    names |= set(group_metrics(groups, [Outcome("0", "purified", eligible=20, above_floor=5)]))
    noisy = dataclasses.replace(
        group(binary(0), binary(3), "noisy"), prompt=Prompt("noisy", X, (1, 5), "", planted=(2,))
    )
    deleted = Outcome("noisy", "purified", noisy.purified_prompt, eligible=4)
    names |= set(group_metrics([rebuild_group(noisy, lens, seed=0, step=0)], [deleted]))
    names |= {f"sampling/{field.name}" for field in dataclasses.fields(SampleCounts)} - {"sampling/reward_seconds"}
    for mode in ("none", "greso"):
        names |= set(PromptFilter(FilterConfig(mode=mode), 4, 0).metrics())  # type: ignore[arg-type]
    everything = LossConfig(
        entropy_coef=0.1, imitation_coef=0.1, engine_correction=EngineCorrectionConfig(mode="truncate")
    )
    batch, current = random_minibatch(0, everything)
    names |= set(finish_metrics(whole(batch, as_parameters(current), everything)[1]))
    names |= set(_evaluation_metrics()) | {"time/eval", "staleness", "staleness_max"}
    of_sync = _names_in("rollout/weight_sync/sync.py", "engine_side.py", prefix="sync")
    in_code = _names_in("diagnostics.py", "host.py", "trainer.py", prefix="diagnostics|purification")
    of_guards = _names_in("host.py", "guards/mismatch.py", "guards/run_guards.py", prefix="guards|rewards|data|time")
    split = LossConfig(entropy_split=EntropySplitConfig())
    batch, current = random_minibatch(0, split)
    names |= set(finish_metrics(whole(batch, as_parameters(current), split)[1])) | {"time/guards/hf_parity"}
    return names | set(_transfer_metrics()) | in_code | of_sync | of_guards


def _evaluation_metrics() -> dict[str, float]:
    prompts = tuple(Prompt(str(i), (1,), (0, 1), "") for i in range(2))
    sets = [EvalSet(name, name, 1, 2, prompts) for name in ("math500", "held_out")]
    answers = [Answer(s.name, p.id, 0, "", "", 1, "stop", 1.0, "correct", "", "") for s in sets for p in prompts]
    return step_metrics(sets, answers)


def _transfer_metrics() -> dict[str, float]:
    lens, tracker = RescueConfig(mode="purification"), TransferTracker(lag=1)
    for step in range(2):  # one prompt rescued, one of the same a not, both seen again
        tracker.update(
            step,
            [
                rebuild_group(group(binary(1), binary(3), "rescued"), lens, seed=0, step=step),
                rebuild_group(group(binary(1), binary(1), "other"), lens, seed=0, step=step),
            ],
        )
    return tracker.metrics()


def _names_in(*files: str, prefix: str) -> set[str]:
    """Names that only a training step writes, as they stand in the code."""
    return {
        name
        for file in files
        for name in re.findall(rf'"((?:{prefix})/\w+)"', (ROOT / "lens_megatron" / file).read_text())
    }


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    torch.manual_seed(0)
    documented, written = documented_metrics(), written_metrics()
    assert len(written) > 80 and "transfer/matched_difference" in written and "diagnostics/grad_cosine" in written
    unknown = {name for name in written if not any(fnmatch.fnmatch(name, pattern) for pattern in documented)}
    assert not unknown
    metric_rows = {
        name
        for cell in re.findall(r"^\| (`[^|]*`) \|", RUNNING.partition("\n## Metrics\n")[2], re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    stale = {pattern for pattern in metric_rows if not fnmatch.filter(written, pattern)}
    assert not stale


def test_diagnostics_are_named_one_by_one() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    for name in _names_in("diagnostics.py", prefix="diagnostics"):
        assert f"`{name}`" in page, name


# --- examples, commands, links


@pytest.mark.parametrize("page", ["README.md", "docs/running.md"])
def test_the_example_run_loads(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    runs = [block for block in blocks if re.search(r"^run_dir:", block, re.MULTILINE)]
    assert runs
    for block in runs:
        path = tmp_path / "RUN.yaml"
        path.write_text(block)
        assert load_run(path, ["steps=10"]).steps == 10
        for overrides in printed_overrides((ROOT / page).read_text()):
            load_run(path, overrides)


def test_the_run_of_the_readme_fits_where_the_readme_plans_it(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    [command] = re.findall(r"lens-megatron plan RUN.yaml([^#\n]*)", text)
    (tmp_path / "RUN.yaml").write_text(block)
    assert main(["plan", str(tmp_path / "RUN.yaml"), *shlex.split(command)]) == 0


def printed_overrides(text: str) -> list[list[str]]:
    """What stands behind `train RUN.yaml`, and the example of changes on the command line."""
    lines = re.findall(r"lens[_-]megatron(?:\.cli)? train RUN\.yaml([^\n#`\[]*)", text)
    lines += re.findall(r"on the command line: `([^`]+)`", text)
    assert lines
    return [[word for word in shlex.split(line) if not word.startswith("--")] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?:^ {4,}|`|bin/)lens-megatron ([a-z][\w-]*)", text, re.MULTILINE):
        assert name in command_names(), name
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[\w-]*)?\)", text):
        assert not target or (page.parent / target).exists(), target
    headings = {
        (path.name, re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-"))
        for path in PAGES
        for line in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    }
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([\w-]*)\)", text):
        assert (Path(target).name or page.name, anchor) in headings, anchor


def test_options_in_the_docs_are_the_commands_own() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    for name, line in re.findall(r"lens-megatron ([a-z]+)((?: [^`\n|#]*)?)", text):
        if name in command_names():
            known = build_parser(name).format_help()
            for option in re.findall(r"(?<!\S)\[?(--[a-z]+)", line):
                # sub-commands of convert have options of their own
                assert option in known or name == "convert", f"{name} {option}"


# --- installation


def test_the_line_for_containers_names_every_dependency() -> None:
    """There nothing is installed by the project itself (--no-deps)."""
    (project,) = re.findall(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    needed = set(re.findall(r'^  "([\w-]+)', project, re.MULTILINE)) - {"torch"}
    (line,) = re.findall(r"pip install -c /tmp/keep\.txt ((?:.*\\\n)*.*)", (ROOT / "docs" / "install.md").read_text())
    assert {re.split("[<>=]", word)[0] for word in shlex.split(line.replace("\\\n", " "))} == needed
