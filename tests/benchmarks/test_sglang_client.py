"""The client's benchmark, small."""

from __future__ import annotations

from benchmarks import sglang_client


def test_a_small_run_counts_its_tokens() -> None:
    result = sglang_client.measure(in_flight=32, mean_tokens=200, token_seconds=0.001, seconds=1.0)
    assert result["rollouts"] > 32
    assert 100 < result["tokens_per_s"] * result["wall_s"] / result["rollouts"] < 300
    assert 0 < result["core_share"] < 0.05, "ten times the target: rollouts are short, and the machine may be busy"
