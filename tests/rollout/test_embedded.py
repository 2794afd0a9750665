"""The embedded engine against sampling without cache and batch, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout.embedded import EmbeddedEngine, uniforms
from lens_megatron.rollout.engine import Request, VersionSpan

from . import tiny


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny.model()


def requests(count: int, **changes: Any) -> list[Request]:
    rng = np.random.default_rng(count)
    made = []
    for i in range(count):
        prompt = tuple(int(t) for t in rng.integers(4, tiny.VOCAB, rng.integers(1, 20)))
        values = {"max_tokens": int(rng.integers(1, 30)), "stop": (tiny.STOP, 7), "seed": 1000 + i, **changes}
        made.append(Request(str(i), prompt, **values))
    return made


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.0, 1.0)])
def test_equals_sampling_without_cache_and_batch(net: Any, temperature: float, top_p: float) -> None:
    wanted = requests(12, temperature=temperature, top_p=top_p)
    engine = EmbeddedEngine(net, slots=5)
    engine.submit(wanted)
    done = tiny.drain(engine)
    assert len(done) == 12
    for request in wanted:
        tokens, logprobs = tiny.slow_sample(net, request)
        assert list(done[request.id].tokens) == tokens
        np.testing.assert_allclose(done[request.id].logprobs, logprobs, atol=2e-5)
        assert done[request.id].finish == ("stop" if tokens[-1] in request.stop else "length")
    if temperature > 0:
        assert {finished.finish for finished in done.values()} == {"stop", "length"}


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 9), st.integers(0, 8))
def test_a_response_depends_on_its_own_request_only(order: list[int], slots: int, late: int) -> None:
    net = tiny.model()
    wanted = requests(9)
    engine = EmbeddedEngine(net, slots=slots)
    engine.submit([wanted[i] for i in order[:late]])
    done = {f.id: f for f in engine.poll(10.0)}
    engine.submit([wanted[i] for i in order[late:]])
    done |= tiny.drain(engine)
    assert {i: done[str(i)].tokens for i in range(9)} == _alone()


def _alone() -> dict[int, tuple[int, ...]]:
    if not _ALONE:
        for i, request in enumerate(requests(9)):
            engine = EmbeddedEngine(tiny.model(), slots=1)
            engine.submit([request])
            _ALONE[i] = tiny.drain(engine)[request.id].tokens
    return _ALONE


_ALONE: dict[int, tuple[int, ...]] = {}


def test_the_same_prompt_with_other_seeds_samples_the_models_distribution(net: Any) -> None:
    prompt = (5, 9, 30)
    engine = EmbeddedEngine(net, slots=4000)
    engine.submit([Request(str(i), prompt, 1, seed=i) for i in range(4000)])
    counts = np.bincount([f.tokens[0] for f in tiny.drain(engine).values()], minlength=tiny.VOCAB)
    with torch.no_grad():
        probs = torch.softmax(net(torch.tensor([prompt])).logits[0, -1], -1).double().numpy()
    chi2 = ((counts - 4000 * probs) ** 2 / (4000 * probs)).sum()
    assert chi2 < 110, "beyond the 99.99% point for 60 degrees of freedom"


def test_uniforms_differ_by_seed_and_by_index() -> None:
    grid = np.array([uniforms([seed] * 50, range(50)) for seed in range(200)])
    assert grid.min() >= 0 and grid.max() < 1
    assert len(np.unique(grid)) == grid.size
    assert abs(grid.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.05


def test_abort_gives_the_part_sampled_so_far_and_frees_the_slot(net: Any) -> None:
    long = Request("long", (5, 6, 7), 40, seed=4)
    queued = Request("queued", (8, 9), 5, seed=5)
    engine = EmbeddedEngine(net, slots=1)
    engine.submit([long, queued])
    for _ in range(4):
        engine.step()
    assert engine.free_slots() == 0
    engine.abort(["long", "unknown"])
    done = tiny.drain(engine)
    assert done["long"].finish == "abort"
    assert list(done["long"].tokens) == tiny.slow_sample(net, long)[0][:4]
    assert list(done["queued"].tokens) == tiny.slow_sample(net, queued)[0]
    engine.submit([long, queued])
    engine.abort(["queued"])
    assert tiny.drain(engine)["queued"].tokens == ()
    assert engine.free_slots() == 1


def test_priority_enters_first(net: Any) -> None:
    engine = EmbeddedEngine(net, slots=1)
    engine.submit([Request("later", (5,), 2, priority=1), Request("first", (5,), 2), Request("second", (6,), 2)])
    order: list[str] = []
    while new := engine.poll(10.0):
        order += [f.id for f in new]
    assert order == ["first", "second", "later"]


def _state(net: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_new_weights_by_bucket_flush_the_cache_of_rows_in_flight() -> None:
    old, new = tiny.model(0), tiny.model(1)
    wanted = Request("a", (5, 6, 7, 8), 12, seed=3)
    engine = EmbeddedEngine(tiny.model(0), slots=2)
    engine.submit([wanted])
    for _ in range(5):
        engine.step()
    engine.begin_update(7)
    assert engine.version == -1 and engine.poll(0.1) == []
    weights = list(_state(new).items())
    for start in range(0, len(weights), 3):
        engine.update(dict(weights[start : start + 3]))
    engine.end_update()
    assert engine.version == 7
    done = tiny.drain(engine)["a"]
    head, head_logprobs = tiny.slow_sample(old, Request("h", wanted.prompt, 5, seed=3))
    assert list(done.tokens[:5]) == head
    # the rest, scored by the new model over the whole context: an old key or value left over would show
    with torch.no_grad():
        logits = new(torch.tensor([[*wanted.prompt, *done.tokens]])).logits[0].log_softmax(-1)
    expected = [float(logits[len(wanted.prompt) + i - 1, t]) for i, t in enumerate(done.tokens)][5:]
    np.testing.assert_allclose(done.logprobs, [*head_logprobs, *expected], atol=2e-5)
    assert done.versions == (VersionSpan(0, 0, 5), VersionSpan(7, 5, 12))
    assert done.oldest_version == 0


@pytest.mark.parametrize("kind, tied", [("qwen3", False), ("llama", True), ("qwen3_moe", False)])
def test_weights_load_under_checkpoint_names(kind: str, tied: bool, tmp_path: Any) -> None:
    from safetensors.torch import load_file

    new = tiny.model(1, kind, tied)
    new.save_pretrained(tmp_path)  # writes the names of HF checkpoints: one tensor an expert
    engine = EmbeddedEngine.from_config(new.config, slots=3)
    engine.submit(requests(3))
    with pytest.raises(RunError, match="no whole set of weights"):
        engine.poll(1.0)
    engine.begin_update(1)
    engine.update(load_file(tmp_path / "model.safetensors"))
    engine.end_update()
    done = tiny.drain(engine)
    for request in requests(3):
        assert list(done[request.id].tokens) == tiny.slow_sample(new, request)[0]


def test_partial_or_wrong_weights_are_refused(net: Any) -> None:
    engine = EmbeddedEngine(tiny.model(), slots=1)
    state = _state(net)
    dropped = state.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(RunError, match="outside"):
        engine.update(state)
    engine.begin_update(1)
    engine.update(state)
    with pytest.raises(RunError, match=r"1 of \d+ weights never came, first model.layers.1.mlp.up_proj"):
        engine.end_update()
    assert engine.version == -1
    with pytest.raises(RunError, match=r"no 'model\.nonsense'"):
        engine.update({"model.nonsense": dropped})
    with pytest.raises(RunError, match=r"is \(48, 31\), the engine's model has \(48, 32\)"):
        engine.update({"model.layers.1.mlp.up_proj.weight": dropped[:, :31]})
    engine.update({"model.layers.1.mlp.up_proj.weight": dropped})
    engine.end_update()
    assert engine.version == 1


def test_a_request_beyond_the_models_positions_is_refused(net: Any) -> None:
    with pytest.raises(UsageError, match="256 positions"):
        EmbeddedEngine(net, slots=1).submit([Request("a", (5,) * 200, 57)])
    with pytest.raises(ValueError, match="already in flight"):
        EmbeddedEngine(net, slots=1).submit([Request("a", (5,), 5), Request("a", (5,), 5)])


def test_a_folder_without_a_model_is_a_usage_error(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="not a model"):
        EmbeddedEngine.from_folder(tmp_path)
