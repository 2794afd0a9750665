"""Every layout of every family equals the HF model in one process: log-probs, entropies, gradients, two updates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import cases, reference
from tests.tiny_models import random_sequences, save_hf

LAYOUTS = {
    "1": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2, sp=False)),
    "tp2+sp": (2, ParallelConfig(tp=2, sp=True)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
    "dp2": (2, ParallelConfig()),
    "ep2": (2, ParallelConfig(ep=2)),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2)),
    "tp2 cp2": (4, ParallelConfig(tp=2, cp=2)),
    "ep2 pp2": (4, ParallelConfig(ep=2, pp=2)),
    "tp2 ep2": (2, ParallelConfig(tp=2, ep=2)),
    "ep2 etp2": (4, ParallelConfig(ep=2, etp=2)),
    "tp2 ep2 etp2": (4, ParallelConfig(tp=2, ep=2, etp=2)),
    "pp3 with ends": (3, ParallelConfig(pp=3, ends_count_as_layers=True)),
    "pp2 vpp3 with ends": (2, ParallelConfig(pp=2, vpp=3, ends_count_as_layers=True)),
}
DENSE = ["1", "tp2", "tp2+sp", "pp2", "pp2 vpp2", "cp2", "dp2", "tp2 pp2"]
MOE = [
    "1",
    "tp2+sp",
    "pp2",
    "pp2 vpp2",
    "cp2",
    "dp2",
    "ep2",
    "tp2 pp2",
    "ep2 pp2",
    "tp2 ep2",
    "ep2 etp2",
    "tp2 ep2 etp2",
]
# by layout, so that a layout's process groups serve every family
COMBINATIONS = sorted(
    [
        *[("llama", name) for name in [*DENSE, "tp2 cp2"]],
        *[("qwen2", name) for name in DENSE],
        *[("qwen3", name) for name in DENSE],
        *[("qwen3_tied", name) for name in [*DENSE, "pp3 with ends", "pp2 vpp3 with ends"]],
        *[("qwen3_moe", name) for name in MOE],
    ],
    key=lambda pair: list(LAYOUTS).index(pair[1]),
)
EACH = pytest.mark.parametrize(("kind", "layout"), COMBINATIONS, ids=[f"{k}-{n}" for k, n in COMBINATIONS])
BUDGET = 64
SEQUENCES = random_sequences(11)  # odd: the data-parallel ranks get unequal numbers
DATA = reference.loss_data(SEQUENCES)


@functools.cache
def expected_scores(folder: Path, temperature: float) -> Any:
    with torch.no_grad():
        model = reference.load(folder)
        return [reference.scores(model, sequence, temperature) for sequence in SEQUENCES]


@functools.cache
def expected_gradients(folder: Path) -> Any:
    loss, named = reference.gradients(reference.load(folder), SEQUENCES, DATA)
    return loss, reference.per_expert(named)


@functools.cache
def expected_weights(folder: Path) -> Any:
    norms, weights = reference.two_updates(reference.load(folder), SEQUENCES, DATA)
    return norms, reference.per_expert(weights)


def largest_relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert set(found) == set(expected)
    errors = {
        name: float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-7))
        for name, value in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


@EACH
def test_scores_equal_hf(kind: str, layout: str, workers: Any, hf_folder: Any) -> None:
    world, parallel = LAYOUTS[layout]
    folder = hf_folder(kind)
    for answer in workers(world).run(cases.score, folder, parallel, SEQUENCES, BUDGET, 0.7):
        for logprobs, entropies, (hf_logprobs, hf_entropies) in zip(*answer, expected_scores(folder, 0.7), strict=True):
            torch.testing.assert_close(logprobs, hf_logprobs, atol=1e-4, rtol=0, equal_nan=True)
            torch.testing.assert_close(entropies, hf_entropies, atol=1e-4, rtol=0, equal_nan=True)


def test_the_order_of_keys_is_worked_out_once_a_pack(workers: Any, hf_folder: Any) -> None:
    for built, packs, layers in workers(2).run(
        cases.order_of_keys_built, hf_folder("llama"), LAYOUTS["cp2"][1], SEQUENCES, BUDGET
    ):
        assert built == packs > 1 < layers


@EACH
def test_gradients_equal_hf(kind: str, layout: str, workers: Any, hf_folder: Any) -> None:
    world, parallel = LAYOUTS[layout]
    folder = hf_folder(kind)
    hf_loss, hf_gradients = expected_gradients(folder)
    answers = workers(world).run(cases.gradients, folder, parallel, SEQUENCES, DATA, BUDGET)
    metrics, found, spread = answers[0]
    assert metrics["loss"] == pytest.approx(hf_loss, rel=1e-4)
    assert metrics["tokens"] == DATA.responses
    assert metrics["longest/max"] >= max(len(s) for s in SEQUENCES)
    assert all(answer[0] == metrics for answer in answers)
    error, worst = largest_relative_error(found, hf_gradients)
    assert error < 1e-4, worst
    assert spread < 1e-5


@EACH
def test_two_updates_equal_hf(kind: str, layout: str, workers: Any, hf_folder: Any) -> None:
    world, parallel = LAYOUTS[layout]
    folder = hf_folder(kind)
    hf_norms, hf_weights = expected_weights(folder)
    assert min(hf_norms) > 2 * reference.CLIP  # clipping acts, so a wrong norm shows in the weights
    answers = workers(world).run(cases.two_updates, folder, parallel, SEQUENCES, DATA, BUDGET)
    for norms, _ in answers:
        assert norms == pytest.approx(hf_norms, rel=1e-4)
    error, worst = largest_relative_error(answers[0][1], hf_weights)
    assert error < 1e-4, worst


OVERLAPPED = {
    "dp2": (2, ParallelConfig()),
    "cp2": (2, ParallelConfig(cp=2)),
    "ep2": (2, ParallelConfig(ep=2)),
    "tp2 dp2": (4, ParallelConfig(tp=2)),
    "pp2 dp2": (4, ParallelConfig(pp=2)),
    "pp2 vpp2 dp2": (4, ParallelConfig(pp=2, vpp=2)),
}


@pytest.mark.parametrize(
    ("kind", "layout"), [(k, n) for n in OVERLAPPED for k in ("qwen3_tied", "qwen3_moe") if "ep" not in n or "moe" in k]
)
def test_overlapped_gradient_sums_change_nothing(kind: str, layout: str, workers: Any, hf_folder: Any) -> None:
    world, parallel = OVERLAPPED[layout]
    folder = hf_folder(kind)
    hf_norms, hf_weights = expected_weights(folder)
    answers = workers(world).run(cases.two_overlapped_updates, folder, parallel, SEQUENCES, DATA, BUDGET)
    for norms, _ in answers:
        assert norms == pytest.approx(hf_norms, rel=1e-4)
    error, worst = largest_relative_error(answers[0][1], hf_weights)
    assert error < 1e-4, worst


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("recompute", ["light", "selective", "full"])
def test_recomputed_activations_change_nothing(kind: str, recompute: str, workers: Any, hf_folder: Any) -> None:
    folder = hf_folder(kind)
    answer = workers(2).run(
        cases.gradients, folder, ParallelConfig(tp=2), SEQUENCES, DATA, BUDGET, recompute=recompute
    )[0]
    error, worst = largest_relative_error(answer[1], expected_gradients(folder)[1])
    assert error < 1e-4, worst


@pytest.mark.parametrize(("kind", "layout"), [("qwen2", "tp2+sp"), ("qwen3_moe", "pp2")])
def test_light_recomputation_gives_the_same_bits(kind: str, layout: str, workers: Any, hf_folder: Any) -> None:
    world, parallel = LAYOUTS[layout]
    kept, again = (
        workers(world).run(cases.gradients, hf_folder(kind), parallel, SEQUENCES, DATA, BUDGET, recompute=recompute)[0]
        for recompute in ("none", "light")
    )
    assert kept[0] == again[0]
    for name, gradient in kept[1].items():
        assert torch.equal(gradient, again[1][name]), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_tied", "qwen3_moe"])
def test_export_is_bit_identical(kind: str, workers: Any, hf_folder: Any, tmp_path: Path) -> None:
    """From TP2 x PP2, through a padded vocabulary and sharded files."""
    folder = hf_folder(kind)
    workers(4).run(cases.export, folder, ParallelConfig(tp=2, pp=2), tmp_path / "out")
    original = load_file(folder / "model.safetensors")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert set(written) == set(original)
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name
    with torch.no_grad():  # and transformers opens it
        logits = reference.load(tmp_path / "out")(SEQUENCES[0][None]).logits
        assert torch.equal(logits, reference.load(folder)(SEQUENCES[0][None]).logits)


def test_bf16_keeps_fp32_main_weights(workers: Any, hf_folder: Any) -> None:
    """At lr 1e-6 a step is smaller than bf16 can hold: only fp32 main weights let steps add up."""
    answers = workers(2).run(cases.bf16_update, hf_folder("qwen3"), ParallelConfig(tp=2), SEQUENCES, DATA, BUDGET)
    changed, main_changed, weights = answers[0]
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert main_changed > 0.9
    assert changed < 0.1


@pytest.mark.parametrize("layout", ["1", "tp2+sp", "pp2"])
def test_bf16_scores_are_near_fp32(layout: str, workers: Any, hf_folder: Any) -> None:
    world, parallel = LAYOUTS[layout]
    folder = hf_folder("llama")
    logprobs, _ = workers(world).run(cases.score, folder, parallel, SEQUENCES, BUDGET, 0.7, torch.bfloat16)[0]
    differences = torch.cat([(a - b[0]).abs()[1:] for a, b in zip(logprobs, expected_scores(folder, 0.7), strict=True)])
    assert differences.mean() < 0.05
    assert differences.max() > 1e-4  # it really was bf16


@pytest.mark.parametrize(("layout", "spoiled", "named"), [
    ("pp2", "", []),
    ("pp2", "output_layer.weight", ["model.embed_tokens.weight"]),  # the tied head, a copy of the first stage's embedding
    ("pp2 vpp2", "output_layer.weight", ["model.embed_tokens.weight"]),
    ("dp2", "word_embeddings.weight", ["model.embed_tokens.weight"]),
])  # fmt: skip
def test_replicas_whose_elements_changed_places_are_told(
    tmp_path: Path, workers: Any, layout: str, spoiled: str, named: list[str]
) -> None:
    ranks, parallel = LAYOUTS[layout]
    folder = save_hf("qwen3_tied", tmp_path / "model")
    assert workers(ranks).run(cases.replicas_that_differ, folder, parallel, spoiled) == [named] * ranks


@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
def test_checksums_are_the_same_in_every_layout(tmp_path: Path, workers: Any, kind: str) -> None:
    folder = save_hf(kind, tmp_path / "model")
    found = {}
    for name in DENSE if kind == "qwen3_tied" else ["1", "tp2+sp", "pp2", "ep2", "tp2 ep2", "ep2 etp2"]:
        ranks, parallel = LAYOUTS[name]
        found[name] = workers(ranks).run(cases.checksums_of, folder, parallel)
    expected = found["1"][0]
    assert expected["weights"] and expected["optimizer.param"]
    assert [name for name, parts in found.items() if any(part != expected for part in parts)] == []
