"""A tiny random model for engine tests, and the slow sampling that the engine must equal."""

from __future__ import annotations

from typing import Any

import torch

from lens_megatron.rollout.embedded import uniforms
from lens_megatron.rollout.engine import Finished, Request

VOCAB = 61
STOP = 3


def model(seed: int = 0, kind: str = "qwen3", tied: bool = True) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    if kind == "qwen3_moe":
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size = 4, 2, 16
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def slow_sample(net: Any, request: Request) -> tuple[list[int], list[float]]:
    """No cache, no batch: the whole context goes through the model for every token."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < request.max_tokens:
        logits_V = net(torch.tensor([[*request.prompt, *tokens]])).logits[0, -1].double()
        scores_V = torch.log_softmax(logits_V / (request.temperature or 1.0), -1)
        if request.temperature == 0:
            token = int(scores_V.argmax())
        else:
            probs = scores_V.exp().tolist()
            kept, mass = set(), 0.0
            for candidate in sorted(range(VOCAB), key=lambda v: -probs[v]):
                if mass >= request.top_p:
                    break
                kept.add(candidate)
                mass += probs[candidate]
            target = float(uniforms([request.seed], [len(tokens)])[0]) * mass
            for token in sorted(kept):
                target -= probs[token]
                if target < 0:
                    break
        tokens.append(token)
        logprobs.append(float(scores_V[token]))
        if token in request.stop:
            break
    return tokens, logprobs


def drain(engine: Any) -> dict[str, Finished]:
    done: dict[str, Finished] = {}
    while new := engine.poll(10.0):
        for finished in new:
            assert finished.id not in done
            done[finished.id] = finished
    return done
