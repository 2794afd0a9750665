"""Which parts of the product import which: the table below, no more and no less.

A part is a package or a file of `lens_megatron`, or a package beside it. Imports inside functions count; those for type
checkers alone do not. A row names what its part imports, all of it from rows above, so that nothing runs in a circle;
UPWARD has the few that do not, each with its reason. A new arrow that a change needs is a word in a row: is it meant?
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lens_megatron

ROOT = Path(lens_megatron.__file__).parent.parent
PACKAGES = ("lens_megatron", "model_configs", "checkpoints_tools", "launchers")  # those of the wheel
OURS = (*PACKAGES, "benchmarks", "tests")

TABLE = """
# nothing of ours
__init__:
errors:
files:
fingerprints:
model_configs:
own_functions:
precision:
progress:
recorder:
rollout_table:
routed_experts:
update_config:

# files, settings, processes
checkpoints:       errors
machine:           __init__
pruning:           checkpoints errors
doctor:            machine
output:            errors
step_line:         errors
stopping:          errors
strict:            errors
tracking:          errors files
workers:           errors files stopping
stacks:            errors workers
run_folder:        checkpoints errors files machine rollout_table strict
folder_note:       strict
hf_config:         errors
model_spec:        errors folder_note hf_config model_configs strict

# the method, on prompts, texts and plain tensors
types:             routed_experts
purification:      types
algorithms:        own_functions purification types
presets:           algorithms errors strict
samples:           algorithms types
rewards:           errors machine own_functions strict
data:              errors model_spec strict types
reference_scores:  types

# the sharded model
mcore:             __init__ checkpoints errors fingerprints folder_note machine model_spec precision pruning
                   routed_experts stacks workers
prompt_signals:    algorithms mcore purification reference_scores types
update:            algorithms mcore routed_experts samples types update_config
diagnostics:       algorithms mcore update update_config
scoring:           data errors mcore model_spec precision prompt_signals purification types
cuda_environment:  machine mcore
endings:           errors mcore run_folder workers

# engines, and what is made of their answers
rollout:           algorithms data errors evaluation files fingerprints machine mcore model_spec precision rewards
                   routed_experts types workers
ahead:             errors purification rollout strict types
serve:             errors rollout
reporting:         __init__ config errors progress run_folder strict
checkpoints_tools: __init__ checkpoints errors files hf_config mcore model_spec planning strict
guards:            checkpoints_tools errors machine mcore routed_experts samples update
evaluation:        __init__ checkpoints checkpoints_tools data errors files folder_note mcore model_spec output
                   precision progress purification reporting rewards rollout scoring strict types

# a run
config:            algorithms checkpoints data errors evaluation guards mcore precision presets rewards rollout strict
                   tracking update_config
resuming:          checkpoints config errors run_folder strict
host:              ahead algorithms config data errors evaluation fingerprints guards model_spec precision purification
                   rewards rollout rollout_table run_folder samples strict tracking types update
engine_side:       config host mcore rollout routed_experts
trainer:           checkpoints config diagnostics engine_side guards host mcore model_spec precision progress
                   prompt_signals purification recorder reference_scores run_folder stacks step_line stopping types
                   update
loop:              config stopping trainer
sft:               config data errors guards mcore model_spec precision progress run_folder stacks strict
quickstart:        data errors mcore model_spec run_folder

# many runs
planning:          config errors mcore model_spec strict
launchers:         checkpoints config data errors evaluation files machine mcore model_spec progress recorder rewards
                   run_folder stopping strict
studies:           __init__ config errors files launchers mcore model_spec planning reporting resuming run_folder strict

# what the user calls
commands:          algorithms checkpoints_tools config cuda_environment data doctor endings errors evaluation files
                   launchers loop mcore model_spec output planning progress quickstart reporting resuming rewards
                   rollout run_folder scoring serve sft stopping strict studies trainer workers
cli:               __init__ commands errors workers
"""

UPWARD = {
    ("rollout", "evaluation"): "the driver's process, which holds the engine, answers benchmarks with it",
    ("reporting", "config"): "a run's keys are shown where they are not the defaults",
    ("checkpoints_tools", "planning"): "`convert inspect` counts parameters",
}


def rows() -> dict[str, set[str]]:
    """In the table's order."""
    lines = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
    found: dict[str, set[str]] = {}
    for line in lines:
        if not line.startswith(" "):
            part, _, line = line.partition(":")
            assert part not in found, f"{part} has two rows"
            found[part] = set()
        found[part] |= set(line.split())
    return found


def modules() -> dict[str, Path]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def part_of(module: str) -> str:
    package, *inside = module.split(".")
    if package != "lens_megatron":
        return package
    return inside[0] if inside else "__init__"


def imports(node: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules, and the lines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(child.orelse, []), known)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, f"line {child.lineno}: relative import"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield (inner if inner in known else child.module), child.lineno
        else:
            yield from imports(child, known)


def arrows() -> dict[tuple[str, str], str]:
    """From part to part, and a place that has each."""
    known = modules()
    found = {}
    for module, path in known.items():
        for name, line in imports(ast.parse(path.read_text()), known):
            here, there = part_of(module), part_of(name)
            if name.partition(".")[0] in OURS and here != there:
                found.setdefault((here, there), f"{path.relative_to(ROOT)}:{line}")
    return found


def test_the_table_says_what_is_imported() -> None:
    table, found = rows(), arrows()
    assert set(table) == {part_of(module) for module in modules()}
    told = {(part, other) for part, others in table.items() for other in others}
    new = [f"{place}: {here} imports {there}" for (here, there), place in found.items() if (here, there) not in told]
    gone = [f"{here} no longer imports {there}" for here, there in sorted(told - found.keys())]
    assert not new + gone, "\n".join(new + gone)


def test_nothing_runs_in_a_circle() -> None:
    place = {part: number for number, part in enumerate(rows())}
    upward = {(part, other) for part, others in rows().items() for other in others if place[other] > place[part]}
    assert upward == UPWARD.keys()


def test_only_mcore_imports_megatron() -> None:
    known = modules()
    found = {
        part_of(module)
        for module, path in known.items()
        for name, _ in imports(ast.parse(path.read_text()), known)
        if name.partition(".")[0] == "megatron"
    }
    assert found == {"mcore"}
