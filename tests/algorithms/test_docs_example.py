"""The example of docs/algorithms.md runs as printed, and the tables there name what exists."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lens_megatron.algorithms.advantages import BASELINES, AdvantageConfig, group_advantages
from lens_megatron.algorithms.loss_config import LossConfig
from lens_megatron.algorithms.surrogates import SURROGATES
from lens_megatron.errors import UsageError
from lens_megatron.presets import load_algorithm, preset_names

DOCS = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()


def test_the_example_adds_an_advantage_and_a_loss() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    statements = [line for line in source.splitlines() if line.strip()]
    assert len(statements) <= 30
    names: dict[str, object] = {}
    try:
        exec(compile(source, "docs/algorithms.md", "exec"), names)
    finally:
        BASELINES.pop("median", None)
        SURROGATES.pop("unclipped", None)
    logprobs = names["logprobs"]
    assert isinstance(logprobs, torch.Tensor) and logprobs.grad is not None
    advantage = 1 / (math.sqrt(1 / 3) + 1e-6)  # the median of 1, 0, 0 is 0, their unbiased std sqrt(1/3)
    # the ratio exp(0.7) = 2.01 is far outside the clip range of grpo, and has its whole gradient
    assert logprobs.grad.tolist() == pytest.approx([-advantage * math.exp(0.7) / 3, 0.0, 0.0], rel=1e-5)


def test_functions_of_ones_own_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says, from a module in the working folder, with which a console script knows nothing of its own."""
    (source,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    (line,) = re.findall(r"^    (algorithm: .*module.*|algorithm: .*mine:.*)$", DOCS, re.MULTILINE)
    (tmp_path / "mine.py").write_text(source[: source.index("BASELINES[")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    algorithm = load_algorithm(yaml.safe_load(line)["algorithm"])
    rewards, nobody = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.bool)
    group = group_advantages(rewards, rewards > 0.5, nobody, success_rate=1 / 3, config=algorithm.advantage)
    assert group.advantages_M.tolist() == pytest.approx([1 / (math.sqrt(1 / 3) + 1e-6), 0.0, 0.0])
    with pytest.raises(UsageError, match=r"advantage.baseline mine:mean: mine has no function mean"):
        load_algorithm({"preset": "grpo", "advantage": {"baseline": "mine:mean"}})
    with pytest.raises(UsageError, match=r"loss.surrogate .clpi. is none of clip, cispo, aspo, and no function"):
        load_algorithm({"preset": "grpo", "loss": {"surrogate": "clpi"}})
    sys.modules.pop("mine", None)


def test_every_preset_and_every_key_is_documented() -> None:
    for name in preset_names():
        assert f"`{name}`" in DOCS, name
    for config in (AdvantageConfig, LossConfig):
        for field in dataclasses.fields(config):
            assert f"`{field.name}`" in DOCS, field.name
    for name in (*BASELINES, *SURROGATES):
        assert f"`{name}`" in DOCS, name
