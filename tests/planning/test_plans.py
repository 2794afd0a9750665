"""Plans, the search and the command: what they must obey whatever the rates are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.cli import main
from lens_megatron.config import load_run
from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import load_model_config
from lens_megatron.planning.describe import keys_of
from lens_megatron.planning.gpus import CALIBRATED, GPUS, assumed_rates, find_gpu, rates_of
from lens_megatron.planning.memory import ROOM, state_bytes
from lens_megatron.planning.parameters import count_parameters
from lens_megatron.planning.plans import PHASES, Placement, Plan, Setup, as_tree, make_plan
from lens_megatron.planning.search import ALIKE, _layouts, search
from lens_megatron.planning.setups import setup_of_run
from lens_megatron.planning.work import Workload, workload_of_run

GPU = find_gpu("h100")
RATES = assumed_rates(GPU)
SPEC = load_model_config("qwen3-8b-base").spec
WORK = Workload(rescued=0.35, scores_prompts=True)
RUN = """
model: qwen3-8b-base
run_dir: runs/planned
algorithm: lens
data: {train: prompts.jsonl}
parallel: {tp: 4, pp: 2}
memory: {recompute: full}
"""


def plan(layout: ParallelConfig, gpus: int = 8, **changes: Any) -> Plan:
    setup = Setup(SPEC, GPU, RATES, WORK, layout, gpus, "colocated", gpus, 1)
    return make_plan(dataclasses.replace(setup, **changes))


def test_one_gpu_holds_eighteen_bytes_a_parameter_and_a_little_padding() -> None:
    state = state_bytes(SPEC, ParallelConfig(), 1, 0, element=2)
    held = state.weights + state.gradients + state.fullest.main_weights + state.fullest.moments
    assert 0 <= held - 18 * count_parameters(SPEC) < 18 * 128 * 1000
    assert state.weights * 2 == state.gradients


@pytest.mark.parametrize("model", ["qwen3-4b-base", "qwen3-30b-a3b"])
def test_all_ranks_together_keep_every_parameters_state_once(model: str) -> None:
    spec = load_model_config(model).spec
    ep = 4 if spec.moe else 1
    layout = ParallelConfig(tp=2, pp=2, ep=ep)
    world = 16
    total = 0
    for stage in range(2):
        state = state_bytes(spec, layout, world, stage, element=2, overlap=True)
        total += int(state.dense.elements.sum()) * 2
        total += 0 if state.expert is None else int(state.expert.elements.sum()) * ep
    layer_repeats = 2 * spec.hidden_size + 2 * spec.head_dim + (spec.moe.experts * spec.hidden_size if spec.moe else 0)
    repeated = spec.layers * layer_repeats + spec.hidden_size  # norms and routers, on both tensor-parallel ranks
    vocabulary = 2 * spec.hidden_size * (-spec.vocab_size % 128)
    tied = spec.vocab_size * spec.hidden_size if spec.tied else 0
    assert total == count_parameters(spec) + repeated + vocabulary + tied


@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(tp=2, pp=2), ParallelConfig(tp=8)])
def test_parts_add_up_to_the_peak_and_phases_to_the_step(layout: ParallelConfig) -> None:
    for recompute in ("none", "light", "selective", "full"):
        one = plan(layout, recompute=recompute)
        assert sum(one.trainer.parts().values()) == one.trainer.peak == max(one.trainer.moments.values())
        assert set(one.seconds) == set(PHASES)
        assert one.step_seconds == pytest.approx(sum(one.seconds.values()))
        json.dumps(as_tree(one), allow_nan=False)


def test_recomputing_trades_time_for_memory() -> None:
    kinds = ("none", "light", "selective", "full")
    plans = [plan(ParallelConfig(tp=2), recompute=kind) for kind in kinds]
    for less, more in itertools.pairwise(plans):
        assert less.trainer.activations > more.trainer.activations
        assert less.seconds["train"] < more.seconds["train"]


def test_moments_on_the_host_trade_time_for_memory() -> None:
    stay, leave = (plan(ParallelConfig(tp=2), 8, offload_optimizer=share) for share in (0.0, 1.0))
    owned = state_bytes(stay.setup.spec, ParallelConfig(tp=2), 8, 0, element=2, overlap=True).fullest
    assert stay.trainer.optimizer - leave.trainer.optimizer == owned.moments
    assert stay.seconds["train"] < leave.seconds["train"]
    assert leave.trainer.peak < stay.trainer.peak


def test_more_gpus_take_less_time_and_no_more_memory() -> None:
    few, many = plan(ParallelConfig(tp=4), 8), plan(ParallelConfig(tp=4), 32)
    assert many.step_seconds < few.step_seconds
    assert many.trainer.optimizer < few.trainer.optimizer
    assert few.trainer.weights == many.trainer.weights


def test_a_step_of_staleness_hides_the_shorter_half_on_gpus_of_their_own() -> None:
    stale = dataclasses.replace(WORK, staleness=1)
    apart = {"placement": "disaggregated", "engine_gpus": 8}
    one, two = plan(ParallelConfig(tp=4), **apart), plan(ParallelConfig(tp=4), work=stale, **apart)
    assert one.seconds == two.seconds
    generated = one.seconds["generate"] + one.seconds["verify"]
    assert two.step_seconds == pytest.approx(max(generated, one.step_seconds - generated))
    together = plan(ParallelConfig(tp=4), work=stale)
    assert together.step_seconds == pytest.approx(sum(together.seconds.values()))


def test_out_of_memory_says_where_and_of_what() -> None:
    small = dataclasses.replace(GPU, memory=40 * 1024**3)
    one = plan(ParallelConfig(), gpu=small)
    assert not one.fits
    assert one.complaint.startswith("out of memory: a trainer GPU of stage 0 needs ")
    assert "activations" in one.complaint
    assert plan(ParallelConfig(tp=8), gpu=small, recompute="full").fits
    no_room = plan(ParallelConfig(tp=8), gpu=dataclasses.replace(GPU, memory=16 * 1024**3), recompute="full")
    assert "the cache of one response" in no_room.complaint or "trainer GPU" in no_room.complaint


def test_a_budget_that_holds_no_sequence_does_not_fit() -> None:
    one = plan(ParallelConfig(tp=8), recompute="full", work=dataclasses.replace(WORK, tokens_per_microbatch=4096))
    assert "tokens_per_microbatch 4096 holds no sequence of 4608" in one.complaint


def test_the_search_returns_the_simplest_of_the_fastest_that_fit() -> None:
    found = search(SPEC, GPU, RATES, WORK, 8, ("colocated",), most=3)
    every = []
    for layout in _layouts(SPEC, 8, 8):
        for recompute in ("none", "light", "selective", "full"):
            one = plan(layout, recompute=recompute)
            if one.trainer.peak <= ROOM * GPU.memory:
                every.append(one)
                break
    times = sorted(one.step_seconds for one in every)
    alike = [one.setup.layout for one in every if one.step_seconds <= (1 + ALIKE) * times[0]]
    first = found.best[0].setup.layout
    assert first in alike and len(alike) > 1
    assert (first.pp, first.cp, first.tp) == min((layout.pp, layout.cp, layout.tp) for layout in alike)
    assert [one.step_seconds for one in found.best[1:]] == [one for one in times if one != found.best[0].step_seconds][
        :2
    ]
    assert all(one.fits for one in found.best) and found.nearest is None


def test_experts_are_spread_before_they_are_cut() -> None:
    fast_storage = dataclasses.replace(RATES, disk=RATES.link)
    found = search(load_model_config("qwen3-30b-a3b").spec, GPU, fast_storage, WORK, 32)
    layout = found.best[0].setup.layout
    assert (
        layout.ep > 1
        and layout.expert_tp == layout.pp == layout.cp == 1
        and found.best[0].setup.placement == "colocated"
    )


def test_slow_storage_drives_servers_from_the_trainers_gpus() -> None:
    """They get their weights through it: written, read again and read, 2 bytes a parameter each time."""
    placements: dict[float, Placement] = {}
    for disk in (2e9, 20e9):
        [best, *_] = search(SPEC, GPU, dataclasses.replace(RATES, disk=disk), WORK, 32).best
        placements[disk] = best.setup.placement
        colocated = make_plan(
            dataclasses.replace(best.setup, placement="colocated", trainer_gpus=32, engine_gpus=32, engine_tp=1)
        )
        nothing = make_plan(dataclasses.replace(colocated.setup, rates=dataclasses.replace(RATES, disk=math.inf)))
        seconds = colocated.seconds["sync"] - nothing.seconds["sync"]
        assert seconds == pytest.approx(3 * 2 * count_parameters(SPEC) / disk)
    assert placements == {2e9: "disaggregated", 20e9: "colocated"}
    one_node = make_plan(dataclasses.replace(colocated.setup, trainer_gpus=8, engine_gpus=8))
    slow = make_plan(dataclasses.replace(one_node.setup, rates=dataclasses.replace(RATES, disk=1.0)))
    assert slow.seconds == one_node.seconds, "memory of the host is shared there"
    for flag in ("disk_gb_s", "network_gb_s"):
        with pytest.raises(UsageError, match="above 0"):
            find_gpu("h100", **{flag: 0.0})
    assert find_gpu("h100", disk_gb_s=10).disk == 10e9 and GPU.disk == 2e9


WAYS = {"distributed": "broadcast", "disk": "files", "tensor": "host memory"}


@pytest.mark.parametrize("transport", ["auto", "distributed", "tensor", "disk"])
@pytest.mark.parametrize(("colocated", "job"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("staged", [False, True])
def test_weights_go_the_way_that_a_run_takes(
    tmp_path: Path, transport: str, colocated: bool, job: bool, staged: bool
) -> None:
    """`job`: of Slurm; the others have one node. Searches keep it."""
    pytest.importorskip("torch")
    from lens_megatron.rollout.weight_sync.transports import make_transports

    placement = "colocated" if colocated else "disaggregated"
    args = "{pp_size: 2}" if staged else "{}"
    path = tmp_path / "RUN.yaml"
    path.write_text(
        f"{RUN}placement: {placement}\nrollout: {{engine: sglang, servers: 4, server: {{args: {args}}}, "
        f"sync: {{transport: {transport}}}}}\n"
    )
    if colocated and transport == "distributed":
        with pytest.raises(UsageError, match="needs servers on GPUs of their own"):
            load_run(path, [])
        return
    config = load_run(path, [])
    gpus = 16 if job else 8
    setup = setup_of_run(config, SPEC, GPU, RATES, workload_of_run(config), gpus)
    only_disk_is_fast = staged or (colocated and job)
    [first, *_] = make_transports(config.rollout.sync, tmp_path, tmp_path, "cuda", colocated, only_disk_is_fast)
    expected = "requests" if first.name == "tensor" and job else WAYS[first.name]
    assert setup.sync_way == expected
    found = search(SPEC, GPU, RATES, WORK, gpus, (setup.placement,), most=1, sync=setup.sync).best
    assert [one.setup.sync_way for one in found] == [expected]


def test_files_in_memory_are_as_fast_as_it(tmp_path: Path) -> None:
    path = tmp_path / "RUN.yaml"
    sync = "sync: {transport: disk, folder: /dev/shm/lens}"
    path.write_text(f"{RUN}placement: colocated\nrollout: {{engine: sglang, servers: 8, {sync}}}\n")
    config = load_run(path, [])
    assert setup_of_run(config, SPEC, GPU, RATES, workload_of_run(config), 8).sync_way == "host memory"


def test_when_nothing_fits_the_nearest_is_named() -> None:
    found = search(load_model_config("llama-3.1-70b").spec, GPU, RATES, WORK, 8)
    assert found.best == [] and found.nearest is not None and found.nearest.complaint
    assert search(load_model_config("llama-3.1-70b").spec, GPU, RATES, WORK, 64).best


def test_measured_rates_replace_assumed_ones(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"h100": {"rates": {"matmul": 1e12}}}))
    rates = rates_of(GPU, file)
    assert rates.matmul == 1e12 and rates.measured == ("matmul",)
    assert rates.bandwidth == RATES.bandwidth
    with pytest.raises(UsageError, match="no measurement of h200"):
        rates_of(find_gpu("h200"), file)
    for wrong in ("{", "[]", '{"h100": {"rates": {"matmul": 0}}}', '{"h100": {}}'):
        file.write_text(wrong)
        with pytest.raises(UsageError):
            rates_of(GPU, file)


def test_the_device_at_hand_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"h100": {"rates": {"matmul": 1e12}}}))
    assert main(["plan", "--calibrate", "--calibration", str(file)]) == 0
    tree = json.loads(file.read_text())
    assert tree["h100"]["rates"] == {"matmul": 1e12}  # what was there stays
    (kind,) = set(tree) - {"h100"}
    rates = tree[kind]["rates"]
    assert set(rates) <= set(CALIBRATED) and min(rates.values()) > 1e7
    assert {"date", "torch", "device", "machine", "dtype"} <= set(tree[kind])
    assert f"{kind} (" in capsys.readouterr().out


def test_device_names_are_recognised() -> None:
    pytest.importorskip("torch")
    from lens_megatron.planning.calibrate import kind_of

    assert kind_of("NVIDIA H100 80GB HBM3") == "h100"
    assert kind_of("NVIDIA A800-SXM4-80GB") == "a800"
    assert kind_of("AMD Instinct MI300X") == "mi300x"
    assert kind_of("Some New Card") == "Some New Card"
    assert set(GPUS) == {"h100", "h200", "a100", "a800", "b200", "mi300x"}


def test_a_run_is_planned_in_its_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "RUN.yaml"
    run.write_text(RUN)
    out = tmp_path / "plan.json"
    assert main(["plan", str(run), "--gpus", "16", "--gpu", "h200", "--json", str(out)]) == 0
    file = json.loads(out.read_text())
    (tree,) = file["plans"]
    assert [one["name"] for one in file["storage"]] == ["checkpoints"]
    assert tree["fits"] and tree["parallel"]["dp"] == 2 and tree["parallel"]["tp"] == 4
    assert sum(tree["memory"]["parts"].values()) == tree["memory"]["peak"]
    assert "embedded engine beside rank 0" in capsys.readouterr().out
    # a layout that does not fit is told before anything is queued, by the exit code too
    assert main(["plan", str(run), "parallel.tp=1", "parallel.pp=1", "memory.recompute=none", "--gpus", "1"]) == 1
    assert "DOES NOT FIT: out of memory" in capsys.readouterr().out


def test_a_plan_of_colocated_servers_says_how_many_it_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "RUN.yaml"
    run.write_text(RUN + "placement: colocated\nrollout: {engine: sglang, servers: 8, server: {tp: 2}}\n")
    assert main(["plan", str(run), "--gpus", "32"]) == 0
    out = capsys.readouterr().out
    assert "parallel.dp=4 " in out and " rollout.servers=16 rollout.server.tp=2\n" in out
    assert "The time is for rollout.servers=16; as it stands the run starts 8." in out
    assert main(["plan", str(run), "--gpus", "16"]) == 0
    out = capsys.readouterr().out
    assert " rollout.servers=8 " in out and "The time is for" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8"], "name a RUN.yaml or --model"),
        (["--model", "qwen3-8b-base"], "--gpus N is missing"),
        (["--model", "qwen3-8b-base", "--gpus", "8", "--gpu", "h1000"], "one of a100, a800"),
        (["--model", "qwen3-9b", "--gpus", "8"], "not a shipped model"),
        (["--model", "qwen3-8b-base", "--gpus", "8", "--calibration", "nowhere.json"], "nowhere.json: No such file"),
        (["--model", "qwen3-8b-base", "steps=3", "--gpus", "8"], "with --model there is none"),
        (["RUN", "--gpus", "12"], "does not divide the 12 processes"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "RUN.yaml"
    run.write_text(RUN)
    assert main(["plan", *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("placement", ["colocated", "disaggregated"])
def test_what_the_search_found_is_run_by_its_keys(tmp_path: Path, placement: Placement) -> None:
    path = tmp_path / "RUN.yaml"
    path.write_text(RUN)
    work = workload_of_run(load_run(path, []))
    found = search(SPEC, GPU, RATES, work, 8, (placement,)).best[0]
    config = load_run(path, keys_of(found))
    again = make_plan(setup_of_run(config, SPEC, GPU, RATES, workload_of_run(config), 8))
    assert (again.trainer, again.engine, again.seconds) == (found.trainer, found.engine, found.seconds)
    assert config.parallel.processes == found.setup.trainer_gpus
