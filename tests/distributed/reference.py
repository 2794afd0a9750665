"""What every layout must equal: the HF model in one process, with a plain loss and torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LR, EPS, CLIP, DECAY = 1e-2, 1e-3, 0.05, 0.1  # eps well above rounding: Adam's first step is not sign(gradient)


@dataclass(frozen=True)
class LossData:
    """A GRPO batch: per sequence an advantage and where its response starts, per token an old log-prob."""

    starts: list[int]
    advantages: list[float]
    old: list[Tensor]

    @property
    def responses(self) -> int:
        return sum(len(old) - start for old, start in zip(self.old, self.starts, strict=True))


def loss_data(sequences: Sequence[Tensor], seed: int = 3) -> LossData:
    generator = torch.Generator().manual_seed(seed)
    return LossData(
        starts=[1 + len(s) // 3 for s in sequences],
        advantages=torch.randn(len(sequences), generator=generator).tolist(),
        old=[-3.0 + torch.randn(len(s), generator=generator) for s in sequences],
    )


def token_loss(logp: Tensor, entropy: Tensor, old: Tensor, advantage: Tensor | float) -> Tensor:
    """Clipped surrogate and an entropy bonus, per token, not yet divided by anything."""
    ratio = (logp - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -surrogate - 0.01 * entropy


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def scores(model: Any, sequence: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p(token) and entropy, NaN for the first token."""
    logits = model(sequence[None]).logits[0, :-1].float() / temperature
    logp = torch.log_softmax(logits, -1)
    nan = torch.full((1,), torch.nan)
    chosen = logp.gather(-1, sequence[1:, None])[:, 0]
    return torch.cat([nan, chosen]), torch.cat([nan, -(logp.exp() * logp).sum(-1)])


def gradients(model: Any, sequences: Sequence[Tensor], data: LossData) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for sequence, start, advantage, old in zip(sequences, data.starts, data.advantages, data.old, strict=True):
        logp, entropy = scores(model, sequence)
        loss = token_loss(logp[start:], entropy[start:], old[start:], advantage).sum() / data.responses
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def two_updates(model: Any, sequences: Sequence[Tensor], data: LossData) -> tuple[list[float], dict[str, Tensor]]:
    parameters = list(model.named_parameters())
    decayed = [p for name, p in parameters if p.dim() > 1]
    plain = [p for name, p in parameters if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.999),
        eps=EPS,
    )
    norms = []
    for _ in range(2):
        gradients(model, sequences, data)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return norms, {name: p.detach().clone() for name, p in parameters}


def per_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 stacks a layer's experts; HF's files, and we, name them one by one."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, experts, part = name.partition(".mlp.experts.")
        if not experts:
            result[name] = tensor
            continue
        for expert, value in enumerate(tensor):
            prefix = f"{head}.mlp.experts.{expert}."
            if part == "gate_up_proj":
                result[prefix + "gate_proj.weight"], result[prefix + "up_proj.weight"] = value.chunk(2)
            else:
                result[prefix + "down_proj.weight"] = value
    return result
