"""Tokens, FLOPs and lengths against independent counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lens_megatron.model_spec import load_model_config, load_model_spec
from lens_megatron.planning.generation import decode_step_seconds, generate
from lens_megatron.planning.gpus import assumed_rates, find_gpu
from lens_megatron.planning.parameters import count_parameters
from lens_megatron.planning.work import Workload, kv_bytes_a_token, share_longer, token_flops, workload_of_run
from tests.tiny_models import hf_model

SPEC = load_model_config("qwen3-8b-base").spec
RATES = assumed_rates(find_gpu("h100"))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_flops_equal_torchs_count_of_the_hf_model(kind: str, tmp_path: object) -> None:
    model, tokens = hf_model(kind), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    flops = token_flops(load_model_spec_of(model))
    # eager attention multiplies the whole square, not only its causal half
    counted = counter.get_total_flops()  # and the few of the rotary angles
    assert 0 <= counted - tokens * flops.forward(tokens) < 1e-3 * counted


def load_model_spec_of(model: object) -> object:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)  # type: ignore[attr-defined]
        return load_model_spec(folder)


@pytest.mark.parametrize("mean", [50.0, 700.0, 2500.0])
def test_cut_lengths_have_the_mean_that_was_asked_for(mean: float) -> None:
    longest = 4096
    area = sum(share_longer(t + 0.5, mean, longest) for t in range(longest))
    assert area == pytest.approx(mean, rel=0.01)
    shares = [share_longer(t, mean, longest) for t in range(0, longest + 1, 64)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 and shares[-1] == 0.0


def test_keys_and_values_of_a_token() -> None:
    assert kv_bytes_a_token(SPEC, 1) == 36 * 2 * 8 * 128 * 2
    assert kv_bytes_a_token(SPEC, 8) == 36 * 2 * 128 * 2
    assert kv_bytes_a_token(SPEC, 16) == kv_bytes_a_token(SPEC, 8)  # a head is not cut: ranks repeat it


def test_decoding_few_responses_reads_the_weights() -> None:
    seconds, limit = decode_step_seconds(SPEC, RATES, 1, running=1, context=100)
    assert limit == "reading weights"
    assert 2 * count_parameters(SPEC) / RATES.bandwidth < seconds < 2 * 2 * count_parameters(SPEC) / RATES.bandwidth
    assert decode_step_seconds(SPEC, RATES, 1, running=256, context=8000)[1] == "reading keys and values"


def test_generation_answers_to_what_it_depends_on() -> None:
    work = Workload()
    plain = generate(SPEC, RATES, work, 8, 1, 256).seconds
    assert generate(SPEC, RATES, work, 4, 1, 256).seconds > plain
    assert generate(SPEC, RATES, work, 8, 1, 32).seconds > 1.5 * plain
    assert generate(SPEC, RATES, Workload(response_tokens=2048), 8, 1, 256).seconds > plain
    assert generate(SPEC, RATES, Workload(longest_response=1100), 8, 1, 256).seconds < plain
    waiting = Workload(rescued=0.5, schedule="after_group")
    overlapped = Workload(rescued=0.5, schedule="speculative")
    assert (
        plain < generate(SPEC, RATES, overlapped, 8, 1, 256).seconds < generate(SPEC, RATES, waiting, 8, 1, 256).seconds
    )


def test_a_run_says_what_its_step_does(tmp_path: object) -> None:
    from lens_megatron.presets import load_algorithm

    def config(preset: str) -> SimpleNamespace:
        return SimpleNamespace(
            algorithm=load_algorithm(preset),
            rollout=SimpleNamespace(n=4, max_response_tokens=1000, schedule="early", staleness=1),
            update=SimpleNamespace(old_logprobs="engine", minibatches=2, epochs=3, tokens_per_microbatch=2048),
            data=SimpleNamespace(prompts_per_step=16, max_prompt_tokens=100),
        )

    lens, grpo = workload_of_run(config("lens")), workload_of_run(config("grpo"))
    assert (lens.prompts, lens.n, lens.minibatches, lens.epochs, lens.schedule) == (16, 4, 2, 3, "early")
    assert lens.staleness == 1
    assert (lens.prompt_tokens, lens.response_tokens, lens.longest) == (100, 250, 1100)
    assert lens.scores_prompts and lens.rescued > 0 and not lens.scores_old
    assert not grpo.scores_prompts and grpo.rescued == 0
    assert workload_of_run(config("dapo")).batches > 1
    assert workload_of_run(config("archer")).scores_entropies
    assert workload_of_run(config("lens"), rescued=0.1, response_tokens=None).rescued == 0.1
