"""Run by test_on_fake_cuda.py, one process a world: a case's name, its arguments as JSON; the last line is the answer."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from benchmarks.fake_cuda import device

device.load()

from benchmarks.step_forecast import forecast  # noqa: E402


def steps(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forecasts, and what the planner says of the same pack."""
    return [{**asdict(forecast(**request)), "planned_gib": _planned(request)} for request in requests]


def _planned(request: dict[str, Any]) -> float:
    """What the planner says is kept of the fullest packs, and what the head's backward pass works in."""
    from benchmarks._work import math_lengths
    from lens_megatron.mcore.head_triton import _SCRATCH
    from lens_megatron.mcore.layout import ParallelConfig, padded_vocab_size
    from lens_megatron.mcore.packing import plan_packs
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.planning.activations import CUDA, Pass, activation_bytes

    spec = replace(load_model_spec(request["model"]), layers=request["layers"])
    shape = {name: request[name] for name in ("tp", "pp", "cp", "ep") if name in request}
    layout, world, rank = ParallelConfig(**shape), request.get("world", 1), request.get("rank", 0)
    dp, tokens = world // layout.model_ranks, request["tokens"]
    lengths = math_lengths(request.get("packs", 2) * tokens * dp, tokens // 4)
    plan = plan_packs(lengths, tokens, dp=dp, cp=layout.cp, tp=layout.tp)[0]
    fullest = max(plan, key=lambda pack: pack.tokens)
    stage = rank // (world // layout.pp)
    kept = activation_bytes(
        spec,
        layout,
        stage,
        Pass(fullest.tokens, fullest.padded_lengths),
        microbatches=len(plan),
        element=2,
        kernels=CUDA,
        recompute=request.get("recompute", "none"),
    )
    if stage == layout.pp - 1:  # gradients of its weights and of hidden states, and its scratch
        rows = padded_vocab_size(spec, layout.tp) // layout.tp
        kept += 2 * spec.hidden_size * (rows + fullest.tokens // layout.cp) + _SCRATCH
    return kept / 2**30


def update(presets: list[str]) -> dict[str, Any]:
    """One update of a tiny policy by each preset: pi_old and reference scored, losses, masks, optimizer."""
    mode, waits = device.start()
    from benchmarks._work import random_policy
    from benchmarks.fake_cuda import exchange, fused
    from benchmarks.fake_cuda.trace import Trace
    from lens_megatron.mcore.layout import ParallelConfig
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.presets import load_algorithm
    from lens_megatron.types import Sample
    from lens_megatron.update import evaluate_samples, update_policy
    from lens_megatron.update_config import UpdateConfig

    trace = Trace(waits)
    fused.install(trace.count)
    exchange.experts()

    def sample(number: int, purified: bool) -> Sample:
        prompt, response = tuple(range(5 + number)), tuple(range(7 + 3 * number))
        roll = prompt[1:] if purified else prompt
        logprobs = (-1.0,) * len(response)
        return Sample(f"p{number}", prompt, roll, response, logprobs, float(purified), purified, 1.0, 0.5, roll)

    groups = [[sample(number, False), sample(number + 1, True)] for number in range(4)]
    done = {}
    with mode, trace:
        policy = random_policy(load_model_spec("tiny-qwen3-tied"), head="triton", layout=ParallelConfig())
        for name in presets:
            loss, settings = load_algorithm(name).loss, UpdateConfig(minibatches=2, tokens_per_microbatch=64)
            evaluated = evaluate_samples(groups, policy, policy, loss, settings, 1.0)
            waits.clear()
            metrics = update_policy(policy, evaluated, loss, settings, 1.0)
            done[name] = {"metrics": sorted(metrics), "waits": dict(waits)}
    return done


def moments_on_the_host(share: float) -> dict[str, Any]:
    """Two steps of the optimizer alone."""
    mode, waits = device.start()
    import torch

    from benchmarks._work import random_policy
    from benchmarks.fake_cuda import fused
    from benchmarks.fake_cuda.trace import Trace
    from lens_megatron.mcore.layout import ParallelConfig
    from lens_megatron.mcore.optimizer import optimizer_parts
    from lens_megatron.model_spec import load_model_spec

    trace = Trace(waits)
    fused.install(trace.count)
    with mode, trace:
        policy = random_policy(
            load_model_spec("tiny-qwen3"), head="triton", layout=ParallelConfig(), offload_optimizer=share
        )
        waits.clear()
        for _ in range(2):
            for chunk in policy.chunks:
                chunk.zero_grad_buffer()
            policy.optimizer.step()
        states = [state for part in optimizer_parts(policy.optimizer.inner) for state in part.optimizer.state.values()]
        held = dict.fromkeys(("cpu", "cuda"), 0)
        for state in states:
            for name in ("exp_avg", "exp_avg_sq"):
                held[state[name].device.type] += state[name].nbytes
        counts = sorted({state["step"].device.type for state in states})
    return {"held": held, "counts": counts, "waits": dict(waits), "torch": torch.__version__}


def score_and_export(_: None) -> dict[str, Any]:
    """Scoring and export."""
    mode, waits = device.start()
    from benchmarks._work import random_policy, random_sequences
    from benchmarks.fake_cuda import fused
    from benchmarks.fake_cuda.trace import Trace
    from lens_megatron.mcore.layout import ParallelConfig
    from lens_megatron.model_spec import load_model_spec

    spec = load_model_spec("tiny-qwen3")
    trace = Trace(waits)
    fused.install(trace.count)
    answer: dict[str, Any] = {}
    with mode, trace:
        policy = random_policy(spec, head="triton", layout=ParallelConfig())
        sequences = random_sequences([7, 20, 3, 40], spec.vocab_size)
        waits.clear()
        scores = policy.score(sequences, 48, entropy=False)
        answer["score"] = {
            "lengths": [len(x) for x in scores.logprobs],
            "devices": sorted({str(x.device) for x in scores.logprobs}),
            "waits": dict(waits),
        }
        exported = list(policy.export_hf())
        answer["export"] = {"tensors": len(exported), "devices": sorted({str(tensor.device) for _, tensor in exported})}
    return answer


if __name__ == "__main__":
    case, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(globals()[case](arguments)))
