"""The whole loss of every preset, through the sharded model: the same gradient however samples are cut and spread."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.presets import preset_names
from tests.distributed import reference, update_cases
from tests.distributed.pool import WorkerPool
from tests.tiny_models import random_sequences, save_hf

LAYOUTS = {
    "small packs": (1, ParallelConfig(), 40),
    "dp2": (2, ParallelConfig(), 64),
    "cp2": (2, ParallelConfig(cp=2), 64),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2), 64),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and its reference, a small step apart."""
    root = tmp_path_factory.mktemp("update")
    return save_hf("qwen3", root / "policy", noise=0.01), save_hf("qwen3", root / "reference")


@functools.cache
def in_one_pack(pool: WorkerPool, folder: Path, reference: Path) -> Any:
    return pool.run(update_cases.preset_gradients, folder, reference, ParallelConfig(), 10_000, preset_names())[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_does_not_depend_on_the_layout(layout: str, workers: Any, folders: tuple[Path, Path]) -> None:
    world, parallel, budget = LAYOUTS[layout]
    expected = in_one_pack(workers(1), *folders)
    found = workers(world).run(update_cases.preset_gradients, *folders, parallel, budget, preset_names())[0]
    assert set(found) == set(expected) and len(found) >= 20
    for preset, (metrics, gradients) in expected.items():
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        assert largest > 1e-6, preset
        for name, gradient in gradients.items():
            error = float((found[preset][1][name] - gradient).abs().max()) / largest
            assert error < 1e-5, (preset, name)
        assert set(found[preset][0]) == set(metrics)
        for name, value in metrics.items():
            other = found[preset][0][name]
            same = math.isnan(value) and math.isnan(other)
            assert same or other == pytest.approx(value, rel=1e-4, abs=1e-5), (preset, name)


def test_old_policy_is_scored_under_the_purified_prompt(workers: Any, folders: tuple[Path, Path]) -> None:
    """Scored under x instead, every ratio of the first update would be 1 and Eq. 5 would vanish without a trace."""
    metrics = workers(2).run(update_cases.trap_of_equation_5, folders[0], ParallelConfig(tp=2))[0]
    assert metrics["ratio_original"] == pytest.approx(1.0, abs=1e-5)
    assert abs(metrics["ratio_purified"] - 1.0) > 0.05
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("layout", ["small packs", "cp2", "tp2", "tp2 pp2", "dp2"])
def test_embedding_gradients_equal_hf(layout: str, workers: Any, folders: tuple[Path, Path]) -> None:
    """What strategy `gradient` goes by: the norm of the gradient of each prompt token's embedding."""
    world, parallel, budget = {**LAYOUTS, "tp2": (2, ParallelConfig(tp=2, sp=False), 64)}[layout]
    sequences = random_sequences(7)
    model = reference.load(folders[0])
    for answer in workers(world).run(update_cases.embedding_norms, folders[0], parallel, sequences, budget):
        for sequence, norms in zip(sequences, answer, strict=True):
            embedded = model.get_input_embeddings()(sequence[None]).detach().requires_grad_()
            logprobs = torch.log_softmax(model(inputs_embeds=embedded).logits[0, :-1], -1)
            logprobs.gather(-1, sequence[1:, None]).sum().backward()
            torch.testing.assert_close(norms, embedded.grad[0].norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_early_signals(workers: Any, folders: tuple[Path, Path]) -> None:
    """Norms and cosine of P's and Y's gradients, against the gradients themselves; the same in every layout."""
    alone = workers(1).run(update_cases.diagnostics, folders[0], ParallelConfig())[0]
    signals = {name: value for name, value in alone.items() if name.startswith("diagnostics/")}
    assert set(signals) == {
        f"diagnostics/{name}"
        for name in (
            "grad_norm_purified",
            "grad_norm_original",
            "grad_cosine",
            "rho_purified_median",
            "logprob_purified_before",
            "logprob_purified_after",
        )
    }
    p, y, cosine = (signals[f"diagnostics/{n}"] for n in ("grad_norm_purified", "grad_norm_original", "grad_cosine"))
    # without a KL term the two parts are the whole gradient, whose norm the update reports by itself
    assert alone["grad_norm"] == pytest.approx(math.sqrt(p**2 + y**2 + 2 * p * y * cosine), rel=1e-4)
    assert p > 0 and y > 0 and -1 <= cosine <= 1
    for world, layout in ((2, ParallelConfig(tp=2)), (2, ParallelConfig())):
        found = workers(world).run(update_cases.diagnostics, folders[0], layout)[0]
        for name, value in signals.items():
            assert found[name] == pytest.approx(value, rel=1e-3), name


def test_schedule_counts_steps_not_updates(workers: Any, folders: tuple[Path, Path]) -> None:
    """Linear decay over 4 steps, whatever the mini-batches; the last step still trains."""
    for minibatches in (1, 3):
        rates = workers(1).run(update_cases.learning_rates, folders[0], minibatches, 4)[0]
        assert rates == pytest.approx([0.8e-4, 0.6e-4, 0.4e-4, 0.2e-4])


@pytest.mark.parametrize("preset", ["grpo", "lens"])
def test_reading_pi_old_off_the_training_pass_changes_no_gradient(
    preset: str, workers: Any, folders: tuple[Path, Path]
) -> None:
    """Exactly, where scoring packs as training does (no x' in between); to rounding, where it packs otherwise."""
    scored, reused = workers(1).run(update_cases.with_and_without_reuse, *folders, preset)[0]
    assert scored[2] == 0 and reused[2] >= 10
    exact = {"rtol": 0.0, "atol": 0.0} if preset == "grpo" else {"rtol": 1e-5, "atol": 1e-8}
    assert max(float(gradient.abs().max()) for gradient in scored[1].values()) > 1e-4
    for name, gradient in scored[1].items():
        torch.testing.assert_close(reused[1][name], gradient, msg=name, **exact)
    assert reused[0]["ratio_original"] == 1.0
    assert reused[0]["loss"] == pytest.approx(scored[0]["loss"], rel=1e-5)
    assert reused[0]["logprob_diff"] == pytest.approx(scored[0]["logprob_diff"], rel=1e-5)
    if preset == "lens":  # whose ratio is what LENS is about
        assert reused[0]["ratio_purified"] == pytest.approx(scored[0]["ratio_purified"], rel=1e-5)
        assert abs(reused[0]["ratio_purified"] - 1) > 0.01


def test_adam_as_one_kernel(workers: Any, folders: tuple[Path, Path]) -> None:
    one, fused = workers(1).run(update_cases.updated_weights, folders[0], True)[0]
    many, plain = workers(1).run(update_cases.updated_weights, folders[0], None)[0]
    assert set(one) == {True} and set(many) == {torch.cuda.is_available()}
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=0, atol=2e-6, msg=name)
